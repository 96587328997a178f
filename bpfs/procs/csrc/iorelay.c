/* iorelay - one a node: the node's ends of all jobs' terminals, pipes and sockets, pumped over a stream a job to its
 * ghost.
 *
 * Driven by bpslave over a SEQPACKET socket (argv[1] is its number). It outlives it, and dies with the supervisor, which
 * has started it, or when nobody has the other end of that socket. What it holds of each channel:
 *   one-way   the other end of a pipe, and an O_PATH descriptor of it, by which unread input can be taken back
 *             without a read end of ours that would hide from us that the job closed its own; when all has been
 *             written such a read end, for what is left at the job's end;
 *   two-way   the other end of a socket pair, and a duplicate of the job's end for the same purpose;
 *   terminal  the pseudo-terminal's master and an open slave (relay_tty.c).
 */
#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_PASSED 253 /* SCM_MAX_FD */
#define END_US (5 * MS)

static struct stream *streams;
static struct port control;

void report(uint32_t type, int id, int b, int c)
{
	struct ctl m = { .type = type, .a = id, .b = b, .c = c };

	send(control.fd, &m, CTL_HEAD, MSG_NOSIGNAL);
}

int reopen(int path_fd, int flags)
{
	char path[32] = "/proc/self/fd/";
	char digits[12];
	int n = 0;

	do
		digits[n++] = '0' + path_fd % 10;
	while (path_fd /= 10);
	for (size_t i = strlen(path); n; )
		path[i++] = digits[--n];
	return open(path, flags | O_CLOEXEC);
}

bool is_pipe(const struct chan *c)
{
	return !c->tty && !chan_bidirectional(c);
}

/* ---- hooks of mux.c ---- */

bool hangs(int fd)
{
	struct pollfd p = { .fd = fd };

	return poll(&p, 1, 0) == 1 && (p.revents & (POLLHUP | POLLERR));
}

ssize_t side_read(struct chan *c, void *data, size_t n)
{
	ssize_t r = read(c->src.fd, data, n);

	if (r == 0 && chan_bidirectional(c))
		c->src_shutdown = !hangs(c->src.fd);
	return r;
}

ssize_t side_write(struct chan *c, const void *data, size_t n)
{
	return write(c->sink.fd, data, n);
}

bool side_may_splice_source(struct chan *c)
{
	return is_pipe(c);
}

bool side_pump_special(struct chan *c)
{
	return c->tty && tty_pump(c);
}

void side_flush_special(struct chan *c)
{
	tty_flush(c);
}

/* While all is held the job moves away: that its ends are closed here says nothing about them. */
bool side_watches_sink(const struct chan *c)
{
	return !c->stream->held;
}

/* A half-closed socket cannot be opened again: it is done when all has been read, and a hold has nothing to take
 * back.
 */
static bool end_waits(struct chan *c)
{
	int unread = 0;

	return c->out_end && c->peer >= 0 && c->sink.fd >= 0 && ioctl(c->peer, FIONREAD, &unread) == 0 && unread;
}

void side_sink_end(struct chan *c)
{
	if (end_waits(c))
		return;
	if (chan_bidirectional(c))
		shutdown(c->sink.fd, SHUT_WR);
	else if (is_pipe(c)) /* with the last end of it the kernel would forget what the job is not going to read */
		c->peer = reopen(c->pipe_path, O_RDONLY | O_NONBLOCK);
	port_close(&c->sink);
}

void side_source_closed(struct chan *c, uint64_t consumed)
{
	(void)consumed;
	if (c->tty)
		tty_hang_up(c);
}

static void close_chan(struct chan *c)
{
	port_close(&c->src);
	port_close(&c->sink);
	if (c->pipe_path >= 0)
		close(c->pipe_path);
	if (c->peer >= 0)
		close(c->peer);
	c->pipe_path = c->peer = -1;
	buf_free(&c->out);
	buf_free(&c->back);
	buf_free(&c->returned);
	if (c->tty)
		tty_free(c);
}

void destroy(struct stream *s)
{
	if (s->dead)
		return;
	s->over = true;
	stream_lose(s, 0);
	for (int i = 0; i < s->nchans; i++)
		close_chan(&s->chans[i]);
	s->dead = true; /* freed after this batch of events */
}

static bool anything_alive(struct stream *s)
{
	for (int i = 0; i < s->nchans; i++)
		if ((s->chans[i].src.fd >= 0 && !s->chans[i].src_end) || s->chans[i].sink.fd >= 0)
			return true;
	return false;
}

void side_lost(struct stream *s, int err)
{
	(void)err;
	if (s->over)
		return; /* destroy() is at work */
	for (int i = 0; i < s->nchans; i++)
		if (s->chans[i].tty)
			line_look(s->chans[i].tty->line);
	if (s->drain_over && !anything_alive(s)) {
		destroy(s);
		report(C_ENDED, s->id, 0, 0);
	} else {
		report(C_LOST, s->id, 0, 0);
	}
}

/* ---- attach and detach ---- */

static bool open_chan(struct chan *c, const int *fds, int n, const struct ctl *m)
{
	int i;

	for (i = 0; i < n; i++)
		fcntl(fds[i], F_SETFD, FD_CLOEXEC);
	c->window = INPUT_WINDOW;
	fcntl(fds[0], F_SETFL, fcntl(fds[0], F_GETFL) | O_NONBLOCK);
	if (c->kind == K_TTY)
		return tty_open(c, fds, n, m->b, m->c);
	if (c->access != O_WRONLY)
		port_open(&c->sink, chan_bidirectional(c) ? fcntl(fds[0], F_DUPFD_CLOEXEC, 0) : fds[0],
			  chan_sink_event, c);
	if (c->access != O_RDONLY)
		port_open(&c->src, fds[0], chan_src_event, c);
	if (chan_bidirectional(c)) {
		c->peer = n > 1 ? fds[1] : -1;
		c->fds[0] = c->peer >= 0 ? fcntl(c->peer, F_GETFL) : 0;
	} else if (c->access == O_RDONLY) {
		c->sink_pipe = true;
		c->pipe_path = reopen(fds[0], O_PATH);
	}
	return true;
}

/* A new connection for a stream whose ghost had to start anew while all was held. */
static bool reattach(struct stream *s, int fd)
{
	stream_lose(s, 0);
	stream_init(s, fd);
	relay_resume(s);
	return true;
}

static bool attach(const struct ctl *m, size_t len, const int *fds, int nfds)
{
	const uint8_t *text = (const uint8_t *)m->text;
	struct chan_record r;
	int used = 1, count = len / sizeof(r);

	if (nfds < 1 || len % sizeof(r) || count > MAX_CHANS)
		return false;
	for (struct stream *s = streams; s; s = s->next)
		if (s->id == m->a && !s->dead)
			return nfds == 1 && reattach(s, fds[0]);
	struct stream *s = calloc(1, sizeof(*s));
	s->chans = calloc(count ? count : 1, sizeof(*s->chans));
	s->id = m->a;
	for (int i = 0; i < count; i++, used += r.nfds) {
		struct chan *c = &s->chans[s->nchans];

		memcpy(&r, text + i * sizeof(r), sizeof(r));
		chan_init(c, s);
		c->id = r.chan;
		c->kind = r.kind;
		c->access = r.access;
		if (!r.nfds || used + r.nfds > nfds || !open_chan(c, fds + used, r.nfds, m))
			break;
		s->nchans++;
	}
	s->next = streams;
	streams = s;
	stream_init(s, fds[0]);
	for (int i = 0; i < s->nchans; i++) {
		if (s->chans[i].sink.fd >= 0)
			chan_grant(&s->chans[i], s->chans[i].window);
		if (s->chans[i].tty)
			line_look(s->chans[i].tty->line);
	}
	return true;
}

static void list_streams(void)
{
	for (struct stream *s = streams; s; s = s->next)
		if (!s->dead)
			report(C_HAS, s->id, !s->open, 0);
	report(C_LISTED, 0, 0, 0);
}

static void control_event(struct port *p, uint32_t events)
{
	static struct ctl m;
	union {
		char space[CMSG_SPACE(sizeof(int) * MAX_PASSED)];
		struct cmsghdr align;
	} anc;
	struct iovec v = { &m, sizeof(m) };
	struct msghdr h = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = &anc, .msg_controllen = sizeof(anc) };
	int fds[MAX_PASSED], n = 0;
	ssize_t r = recvmsg(p->fd, &h, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	(void)events;
	if (r < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (r < (ssize_t)CTL_HEAD)
		_exit(0); /* bpslave is gone, and so is this node */
	struct cmsghdr *c = CMSG_FIRSTHDR(&h);
	if (c && c->cmsg_type == SCM_RIGHTS) {
		n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(fds, CMSG_DATA(c), n * sizeof(int));
	}
	if (m.type == C_ATTACH && attach(&m, r - CTL_HEAD, fds, n))
		return;
	if (m.type == C_FRONTED)
		line_fronted(m.a);
	if (m.type == C_LIST)
		list_streams();
	for (int i = 0; i < n; i++)
		close(fds[i]);
	if (m.type != C_DETACH)
		return;
	for (struct stream *s = streams; s; s = s->next)
		if (s->id == m.a)
			destroy(s);
	report(C_ENDED, m.a, 0, 0); /* also of one that is gone already: bpslave waits for it */
}

static void bury(void)
{
	for (struct stream **at = &streams, *s; (s = *at); ) {
		if (!s->dead || s->dirty) {
			at = &s->next;
			continue;
		}
		*at = s->next;
		free(s->chans);
		free(s);
	}
}

/* What must be looked at by time. Returns microseconds until the next look, -1: none. */
static int64_t ticks(void)
{
	int64_t now = now_us(), next = lines_tick(now);

	for (struct stream *s = streams; s; s = s->next)
		for (int i = 0; i < s->nchans && s->open && !s->held; i++) {
			struct chan *c = &s->chans[i];
			int64_t t = INT64_MAX;

			if (c->tty)
				t = tty_tick(c, now);
			else if (end_waits(c))
				t = now + END_US;
			else if (c->out_end && !c->out.len && c->sink.fd >= 0)
				side_sink_end(c);
			if (t < next)
				next = t;
		}
	return next == INT64_MAX ? -1 : next <= now ? 0 : next - now;
}

int main(int argc, char **argv)
{
	if (argc != 2) {
		static const char usage[] = "usage: iorelay CONTROL-DESCRIPTOR (started by bpslave)\n";
		return write(2, usage, sizeof(usage) - 1) < 0 ? 2 : 2;
	}
	/* When the supervisor dies the kernel kills this process before the jobs, whose init was started later: else their
	 * ends would be told to their ghosts, as if they had closed their files themselves. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGINT, SIG_IGN);
	signal(SIGHUP, SIG_IGN);
	loop_init();
	fcntl(atoi(argv[1]), F_SETFD, FD_CLOEXEC);
	port_open(&control, atoi(argv[1]), control_event, NULL);
	port_want(&control, EPOLLIN);
	for (;;) {
		loop_once(ticks());
		bury();
	}
}
