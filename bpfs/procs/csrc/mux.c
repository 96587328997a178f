/* mux.c - pumping channels over one TCP stream, for ghost and iorelay alike.
 *
 * Level-triggered epoll. After each batch of events every stream that was touched is serviced once: send, read
 * sources while the other side grants credit, write sinks, say what to wait for. A source is never in the epoll set
 * unless it is wanted, since a hang-up cannot be masked and would spin. A sink always is, with no events, so that
 * the death of its reader is seen at once.
 */
#define _GNU_SOURCE
#include "mux.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHUNK (64u << 10)       /* one read(2) */
#define TX_HIGH (128u << 10)    /* no more is read while so much waits for the network */
#define SPLICE_MIN (16u << 10)  /* below this copying is cheaper than splicing */

/* ---- frames out ---- */

void frame_put(struct stream *s, uint8_t type, uint8_t chan, const void *data, uint32_t len)
{
	struct frame h = { .type = type, .chan = chan, .len = len };

	if (!s->open)
		return;
	buf_add(&s->tx, &h, sizeof(h));
	if (len)
		buf_add(&s->tx, data, len);
	stream_mark(s);
}

void frame_put_u32(struct stream *s, uint8_t type, uint8_t chan, uint32_t value)
{
	frame_put(s, type, chan, &value, sizeof(value));
}

struct chan *chan_find(struct stream *s, uint8_t id)
{
	for (int i = 0; i < s->nchans; i++)
		if (s->chans[i].id == id)
			return &s->chans[i];
	return NULL;
}

void chan_init(struct chan *c, struct stream *s)
{
	memset(c, 0, sizeof(*c));
	c->stream = s;
	c->src.fd = c->sink.fd = c->pipe_path = c->peer = -1;
	c->src_gate = true;
}

bool chan_bidirectional(const struct chan *c)
{
	return c->access == O_RDWR;
}

void chan_grant(struct chan *c, uint32_t credit)
{
	if (!credit || c->sink_gone)
		return;
	c->granted += credit;
	frame_put_u32(c->stream, F_WINDOW, c->id, credit);
}

/* n bytes reached the sink: let as many more come, in steps that are worth a frame. */
void chan_eat(struct chan *c, size_t n)
{
	struct stream *s = c->stream;

	s->progress = true;
	c->eaten += n;
	c->moved += n;
	if (s->held || s->holding || c->eaten < c->window / 4)
		return;
	if (!c->granted && c->window < INPUT_WINDOW_MAX) {
		c->eaten += c->window; /* the reader keeps up: read further ahead */
		c->window *= 2;
	}
	chan_grant(c, c->eaten);
	c->eaten = 0;
}

void chan_sink_gone(struct chan *c)
{
	if (c->sink_gone)
		return;
	int unread = 0;
	c->sink_gone = true;
	if (c->sink.fd >= 0)
		ioctl(c->sink.fd, FIONREAD, &unread); /* of a pipe either end tells */
	uint64_t consumed = c->moved - unread;
	port_close(&c->sink);
	buf_free(&c->out);
	frame_put(c->stream, F_CLOSED, c->id, &consumed, sizeof(consumed));
	stream_mark(c->stream);
}

void chan_src_event(struct port *p, uint32_t events)
{
	struct chan *c = p->owner;

	(void)events;
	p->ready = true;
	stream_mark(c->stream);
}

void chan_sink_event(struct port *p, uint32_t events)
{
	struct chan *c = p->owner;

	if (events & (EPOLLERR | EPOLLHUP))
		chan_sink_gone(c);
	stream_mark(c->stream);
}

/* ---- sending ---- */

/* splice(2) sends each piece but the last with MSG_MORE. When the socket takes no more in the middle, the piece
 * before it stays corked for 200 ms (seen on the loopback device): setting TCP_NODELAY sends what is pending.
 */
static void uncork(struct stream *s)
{
	int one = 1;

	setsockopt(s->tcp.fd, 6 /* IPPROTO_TCP */, 1 /* TCP_NODELAY */, &one, sizeof(one));
}

/* Returns false when the socket is full or broken. */
static bool tx_push(struct stream *s)
{
	ssize_t r;

	if (!s->open)
		return false;
	while (s->splice_left) {
		if (s->lead_left) {
			r = send(s->tcp.fd, s->lead + sizeof(s->lead) - s->lead_left, s->lead_left,
				 MSG_NOSIGNAL | MSG_DONTWAIT | MSG_MORE);
			if (r > 0)
				s->lead_left -= r;
		} else {
			r = splice(s->way[0], NULL, s->tcp.fd, NULL, s->splice_left, SPLICE_F_NONBLOCK | SPLICE_F_MOVE);
			if (r > 0)
				s->splice_left -= r;
		}
		if (r <= 0)
			goto stuck;
		s->progress = true;
	}
	while (s->tx.len) {
		r = send(s->tcp.fd, buf_head(&s->tx), s->tx.len, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (r <= 0)
			goto stuck;
		s->progress = true;
		buf_drop(&s->tx, r);
	}
	return true;
stuck:
	if (errno != EAGAIN && errno != EINTR)
		stream_lose(s, errno);
	else if (s->splice_left)
		uncork(s);
	return false;
}

static bool way_open(struct stream *s)
{
	if (s->way[0] >= 0)
		return true;
	if (pipe2(s->way, O_CLOEXEC | O_NONBLOCK) < 0) {
		s->way[0] = s->way[1] = -1;
		return false;
	}
	for (int i = 0; i < 2; i++) { /* out of the way of the job's own numbers */
		int high = fcntl(s->way[i], F_DUPFD_CLOEXEC, 200);
		if (high >= 0) {
			close(s->way[i]);
			s->way[i] = high;
		}
	}
	fcntl(s->way[0], F_SETPIPE_SZ, FRAME_MAX);
	return true;
}

/* What a source may send now. */
uint32_t chan_allowance(const struct chan *c)
{
	return c->stream->holding ? FRAME_MAX : c->credit;
}

static void spend(struct chan *c, size_t n)
{
	c->credit -= n < c->credit ? n : c->credit;
	c->moved += n;
	c->stream->progress = true;
}

static void source_end(struct chan *c)
{
	c->src_end = true;
	c->draining = false;
	port_forget(&c->src);
}

/* One piece from the source; returns false when there is none now. */
static bool source_piece(struct chan *c)
{
	struct stream *s = c->stream;
	uint32_t most = chan_allowance(c);
	struct frame h = { .type = F_DATA, .chan = c->id };
	int waiting = 0;
	ssize_t r;

	if (most > FRAME_MAX)
		most = FRAME_MAX;
	if (!s->tx.len && side_may_splice_source(c) && ioctl(c->src.fd, FIONREAD, &waiting) == 0 &&
	    waiting >= (int)SPLICE_MIN && way_open(s)) {
		r = splice(c->src.fd, NULL, s->way[1], NULL, most, SPLICE_F_NONBLOCK | SPLICE_F_MOVE);
		if (r > 0) {
			h.len = r;
			memcpy(s->lead, &h, sizeof(h));
			s->lead_left = sizeof(h);
			s->splice_left = r;
			spend(c, r);
			return tx_push(s);
		}
	}
	if (most > CHUNK)
		most = CHUNK;
	uint8_t *room = buf_room(&s->tx, sizeof(h) + most);
	r = side_read(c, room + sizeof(h), most);
	if (r > 0) {
		h.len = r;
		memcpy(room, &h, sizeof(h));
		s->tx.len += sizeof(h) + r;
		spend(c, r);
		return true;
	}
	if (r < 0 && errno == EAGAIN)
		c->draining = false;
	else if (r < 0 && errno == EINTR)
		return true;
	else
		source_end(c); /* an error of the file ends it, too: nothing more can be read */
	return false;
}

static void source_pump(struct chan *c)
{
	struct stream *s = c->stream;

	if (s->held || side_pump_special(c))
		return;
	while (s->open && !s->splice_left && s->tx.len < TX_HIGH) {
		uint32_t most = chan_allowance(c);

		if (c->back.len) {
			if (!most)
				return;
			if (most > c->back.len)
				most = c->back.len;
			if (most > CHUNK)
				most = CHUNK;
			frame_put(s, F_DATA, c->id, buf_head(&c->back), most);
			buf_drop(&c->back, most);
			spend(c, most);
			continue;
		}
		if (c->src_end) {
			c->draining = false;
			if (!c->eof_sent)
				frame_put_u32(s, F_EOF, c->id, c->src_shutdown);
			c->eof_sent = true;
			return;
		}
		if (c->src.fd < 0 || !c->src_gate) {
			c->draining = false;
			return;
		}
		if (!most || !(c->src.ready || c->src.always || c->draining))
			return;
		c->src.ready = false;
		bool more = source_piece(c);
		if (!c->draining && !c->src_end)
			return;
		if (!more && !c->src_end)
			return;
	}
}

/* ---- streams ---- */

void stream_init(struct stream *s, int fd)
{
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	port_open(&s->tcp, fd, stream_event, s);
	uncork(s);
	s->open = true;
	s->held = s->holding = false;
	s->head_len = s->left = 0;
	s->lead_left = s->splice_left = 0;
	s->settings = 0;
	s->way[0] = s->way[1] = -1;
	stream_mark(s);
}

void stream_lose(struct stream *s, int err)
{
	if (!s->open)
		return;
	s->open = false;
	port_close(&s->tcp);
	if (s->way[0] >= 0) {
		close(s->way[0]);
		close(s->way[1]);
		s->way[0] = s->way[1] = -1;
	}
	buf_free(&s->tx);
	s->lead_left = s->splice_left = 0;
	side_lost(s, err);
}

static void arm(struct stream *s)
{
	if (s->open)
		port_want(&s->tcp, EPOLLIN | (s->tx.len || s->splice_left ? EPOLLOUT : 0));
	for (int i = 0; i < s->nchans; i++) {
		struct chan *c = &s->chans[i];
		bool want = s->open && !s->held && !c->src_end && c->src_gate && !c->back.len && chan_allowance(c) &&
			    s->tx.len < TX_HIGH && !s->splice_left && c->src.fd >= 0;

		if (want && !c->src.ready)
			port_want(&c->src, EPOLLIN);
		else
			port_forget(&c->src);
		/* A drain goes on when the last piece got through only after its turn. */
		if (want && (c->src.ready || c->src.always || (c->draining && chan_allowance(c) > TTY_MAX)))
			stream_mark(s);
		if (!side_watches_sink(c))
			port_forget(&c->sink);
		else if (c->sink.fd >= 0)
			port_want(&c->sink, c->out.len && !c->sink_gate && !c->records ? EPOLLOUT : 0);
	}
}

void stream_service(struct stream *s)
{
	if (s->dead)
		return;
	tx_push(s);
	for (int i = 0; i < s->nchans; i++)
		source_pump(&s->chans[(s->turn + i) % s->nchans]);
	s->turn++;
	tx_push(s);
	for (int i = 0; i < s->nchans; i++)
		chan_flush(&s->chans[i]);
	side_serviced(s);
	tx_push(s);
	if (!s->dead)
		arm(s);
}
