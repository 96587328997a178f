/* relay_hold.c - getting everything out of the node's ends of a job that moves on or has ended. */
#define _GNU_SOURCE
#include "relay.h"

#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static void put_back(struct chan *c, int fd)
{
	static uint8_t data[64 << 10];
	ssize_t r;

	while ((r = read(fd, data, sizeof(data))) > 0)
		frame_put(c->stream, F_BACK, c->id, data, r);
}

/* Everything on its way into the job that it has not read: first from its own end, then what waits here. */
static void take_back(struct chan *c)
{
	if (c->tty) {
		tty_take_back(c);
	} else if (chan_bidirectional(c) && c->peer >= 0) {
		fcntl(c->peer, F_SETFL, fcntl(c->peer, F_GETFL) | O_NONBLOCK);
		put_back(c, c->peer);
		fcntl(c->peer, F_SETFL, c->fds[0]);
	} else if (c->pipe_path >= 0) {
		int fd = reopen(c->pipe_path, O_RDONLY | O_NONBLOCK);

		if (fd >= 0) {
			put_back(c, fd);
			close(fd);
		}
	}
	while (c->out.len) {
		size_t n = c->out.len < FRAME_MAX ? c->out.len : FRAME_MAX;

		frame_put(c->stream, F_BACK, c->id, buf_head(&c->out), n);
		buf_drop(&c->out, n);
	}
	c->granted = c->credit = c->eaten = c->moved = 0;
}

static bool still_draining(struct stream *s)
{
	if (s->splice_left)
		return true;
	for (int i = 0; i < s->nchans; i++)
		if (s->chans[i].draining || (s->chans[i].tty && s->chans[i].tty->line->settling))
			return true;
	return false;
}

static void drain_start(struct stream *s)
{
	for (int i = 0; i < s->nchans; i++)
		s->chans[i].draining = !s->chans[i].src_end || !s->chans[i].eof_sent;
}

static void look_at_lines(struct stream *s)
{
	for (int i = 0; i < s->nchans; i++)
		if (s->chans[i].tty)
			line_look(s->chans[i].tty->line);
}

void side_serviced(struct stream *s)
{
	if (!s->open || still_draining(s))
		return;
	if (s->holding) {
		for (int i = 0; i < s->nchans; i++)
			take_back(&s->chans[i]);
		s->holding = false;
		s->held = true;
		frame_put(s, F_HELD, 0, NULL, 0);
		look_at_lines(s);
	}
	if (s->drain_asked) {
		s->drain_asked = false;
		for (int i = 0; i < s->nchans; i++) {
			struct chan *c = &s->chans[i];

			if (c->tty)
				tty_drained(c, s->drain_over, s->drain_stops);
			if (s->drain_over && c->sink.fd >= 0 && hangs(c->sink.fd))
				chan_sink_gone(c);
		}
		frame_put_u32(s, F_DRAINED, 0, s->drain_token);
	}
}

/* The job had been given all of its input, and has ended: what it did not read is for who reads next at home, unless a
 * child of it still has the pipe. */
static void give_rest(struct chan *c)
{
	int unread = 0;

	ioctl(c->peer, FIONREAD, &unread);
	close(c->peer);
	c->peer = -1;
	int fd = reopen(c->pipe_path, O_WRONLY | O_NONBLOCK);
	if (unread && fd >= 0 && hangs(fd)) { /* it has no reader */
		uint64_t consumed = c->moved - unread;

		frame_put(c->stream, F_CLOSED, c->id, &consumed, sizeof(consumed));
	}
	if (fd >= 0)
		close(fd);
}

static void drain(struct stream *s, uint32_t token, uint32_t why, uint32_t group)
{
	bool over = why == DRAIN_END;

	s->drain_asked = true;
	s->drain_stops = why == DRAIN_STOP;
	s->drain_token = token;
	s->drain_over |= over;
	for (int i = 0; over && i < s->nchans; i++) {
		struct chan *c = &s->chans[i];

		/* From now on the end of file shall come through, once the last child has closed it. */
		if (c->peer >= 0 && is_pipe(c))
			give_rest(c);
		if (c->peer >= 0)
			close(c->peer);
		c->peer = -1;
		if (c->tty)
			tty_over(c, group);
	}
	drain_start(s);
}

void relay_resume(struct stream *s)
{
	s->held = s->holding = false;
	for (int i = 0; i < s->nchans; i++) {
		struct chan *c = &s->chans[i];

		/* It had been given its end of file, which the ghost sends once more. */
		if (is_pipe(c) && c->sink.fd < 0 && c->pipe_path >= 0 && !c->sink_gone) {
			int fd = reopen(c->pipe_path, O_WRONLY | O_NONBLOCK);

			if (fd >= 0)
				port_open(&c->sink, fd, chan_sink_event, c);
			if (c->peer >= 0)
				close(c->peer);
			c->peer = -1;
		}
		c->out_end = false;
		if (c->sink.fd >= 0)
			chan_grant(c, c->window);
	}
	look_at_lines(s);
}

bool side_frame(struct stream *s, const struct frame *h, const uint8_t *data)
{
	struct chan *c = chan_find(s, h->chan);
	uint32_t v[3] = { 0, 0, 0 };

	memcpy(v, data, h->len < sizeof(v) ? h->len : sizeof(v));
	switch (h->type) {
	case F_HOLD:
		s->holding = true;
		drain_start(s);
		return true;
	case F_RESUME:
		relay_resume(s);
		return true;
	case F_DRAIN:
		drain(s, v[0], v[1], v[2]);
		return true;
	case F_BYE:
		destroy(s);
		report(C_ENDED, s->id, 0, 0);
		return true;
	}
	return c && c->tty && tty_frame(c, h, data);
}
