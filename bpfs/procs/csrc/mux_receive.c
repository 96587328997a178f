/* mux_receive.c - what comes in on a stream: frames taken apart, data put straight to its place, sinks written. */
#define _GNU_SOURCE
#include "mux.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHUNK (64u << 10)       /* one recv(2) */
#define SPLICE_MIN (16u << 10)  /* below this copying is cheaper than splicing */
#define ROUNDS 64               /* most pieces taken from one stream before others get their turn */

void chan_flush(struct chan *c)
{
	if (c->records) {
		side_flush_special(c);
		return;
	}
	while (c->out.len && c->sink.fd >= 0) {
		ssize_t r = side_write(c, buf_head(&c->out), c->out.len);

		if (r > 0) {
			buf_drop(&c->out, r);
			chan_eat(c, r);
			continue;
		}
		if (r < 0 && errno == EINTR)
			continue;
		if (r < 0 && errno != EAGAIN)
			chan_sink_gone(c);
		break;
	}
	if (!c->out.len && c->out_end && c->sink.fd >= 0)
		side_sink_end(c);
}

static bool begin_frame(struct stream *s)
{
	struct frame h;

	memcpy(&h, s->head, sizeof(h));
	s->left = h.len;
	s->small_len = 0;
	if (h.type != F_DATA && h.type != F_BACK)
		return h.len <= SMALL_MAX;
	struct chan *c = chan_find(s, h.chan);
	if (h.len > FRAME_MAX || !c)
		return false;
	if (h.type == F_DATA) {
		if (h.len > c->granted || (c->records && h.len > TTY_MAX))
			return false; /* nobody sends what was not asked for */
		c->granted -= h.len;
	}
	if (h.type == F_BACK && c->returned.len + h.len > HOLD_MAX)
		return false;
	uint16_t length = h.len;
	if (h.type == F_DATA && c->records)
		buf_add(&c->out, &length, sizeof(length));
	if (h.type == F_BACK && c->kind == K_TTY)
		buf_add(&c->returned, &length, sizeof(length));
	return true;
}

static bool end_frame(struct stream *s)
{
	struct frame h;
	uint32_t value = 0;
	uint64_t consumed = UINT64_MAX;

	memcpy(&h, s->head, sizeof(h));
	s->head_len = 0;
	if (h.type == F_DATA || h.type == F_BACK)
		return true;
	if (s->small_len >= sizeof(value))
		memcpy(&value, s->small, sizeof(value));
	struct chan *c = chan_find(s, h.chan);
	switch (h.type) {
	case F_EOF:
		if (!c)
			return false;
		if (c->records) {
			buf_add(&c->out, &(uint16_t){ 0 }, sizeof(uint16_t));
		} else {
			c->out_end = true;
			c->out_shutdown = value;
		}
		return true;
	case F_WINDOW:
		if (!c || value > HOLD_MAX || c->credit > HOLD_MAX)
			return false;
		c->credit += value;
		return true;
	case F_CLOSED:
		if (!c)
			return false;
		if (s->small_len >= sizeof(consumed))
			memcpy(&consumed, s->small, sizeof(consumed));
		side_source_closed(c, consumed);
		port_close(&c->src);
		buf_free(&c->back);
		c->src_end = c->eof_sent = true;
		c->draining = false;
		return true;
	default:
		return side_frame(s, &h, s->small);
	}
}

/* Payload straight to its place. Returns bytes taken, 0 at end of file, -1 with errno. */
static ssize_t take(struct stream *s)
{
	static uint8_t nowhere[CHUNK];
	struct frame h;
	size_t most = s->left < CHUNK ? s->left : CHUNK;
	struct buf *b;
	ssize_t r;

	memcpy(&h, s->head, sizeof(h));
	struct chan *c = chan_find(s, h.chan);
	if (h.type == F_DATA && (c->sink_gone || c->sink.fd < 0))
		return recv(s->tcp.fd, nowhere, most, MSG_DONTWAIT);
	if (h.type == F_DATA && c->sink_pipe && !c->sink_gate && !c->out.len && s->left >= SPLICE_MIN) {
		r = splice(s->tcp.fd, NULL, c->sink.fd, NULL, s->left, SPLICE_F_NONBLOCK | SPLICE_F_MOVE);
		if (r > 0)
			chan_eat(c, r);
		if (r > 0)
			return r;
		if (r < 0 && errno == EPIPE) {
			chan_sink_gone(c);
			errno = EINTR;
			return -1;
		}
		if (r < 0 && errno == EINVAL)
			c->sink_pipe = false;
		/* The pipe is full, or nothing has come: the next line tells which. */
	}
	if (h.type == F_DATA || h.type == F_BACK) {
		b = h.type == F_DATA ? &c->out : &c->returned;
		r = recv(s->tcp.fd, buf_room(b, most), most, MSG_DONTWAIT);
		if (r > 0)
			b->len += r;
		return r;
	}
	r = recv(s->tcp.fd, s->small + s->small_len, s->left, MSG_DONTWAIT);
	if (r > 0)
		s->small_len += r;
	return r;
}

void stream_event(struct port *p, uint32_t events)
{
	struct stream *s = p->owner;
	ssize_t r;

	stream_mark(s);
	if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
		return;
	for (int i = 0; i < ROUNDS && s->open; i++) {
		if (s->head_len < sizeof(s->head)) {
			r = recv(p->fd, s->head + s->head_len, sizeof(s->head) - s->head_len, MSG_DONTWAIT);
			if (r > 0 && (s->head_len += r) == sizeof(s->head) && !begin_frame(s)) {
				stream_lose(s, EPROTO);
				return;
			}
		} else {
			r = take(s);
			if (r > 0)
				s->left -= r;
		}
		if (r == 0 || (r < 0 && errno != EAGAIN && errno != EINTR)) {
			stream_lose(s, r ? errno : 0);
			return;
		}
		if (r < 0 && errno == EAGAIN)
			return;
		s->progress = true;
		if (s->head_len == sizeof(s->head) && !s->left && !end_frame(s)) {
			stream_lose(s, EPROTO);
			return;
		}
	}
}
