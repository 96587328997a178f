/* relay_tty.c - the node's end of a terminal: a pseudo-terminal that passes bytes on untouched.
 *
 * EXTPROC (the kernel's hook for telnet's line mode) switches echo, line editing and signals off in the pseudo-
 * terminal while its flags read as the job set them; packet mode tells of each tcsetattr. Output processing has no
 * such switch: what comes out is processed already, which the ghost takes into account.
 */
#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define TCGETS 0x5401
#define TCSETS 0x5402
#ifndef TIOCSIG
#define TIOCSIG 0x40045436
#endif
#ifndef TIOCPKT_IOCTL
#define TIOCPKT_IOCTL 64
#endif
#define K_ICANON 2u
#define K_EXTPROC 0200000u
#define VEOF_INDEX 4
#define VMIN_INDEX 6

#ifndef TIOCSLCKTRMIOS
#define TIOCSLCKTRMIOS 0x5457
#endif

#define RECORD_MS 5      /* a record waits until the job has read the one before */
#define WANT_MIN_MS 1    /* first look for a waiting reader, then doubled */
#define WANT_MAX_MS 50
#define BACKGROUND_MS 250

struct tty {
	int slave;          /* our own open of it, nonblocking */
	int job;            /* duplicate of the job's: tells when it set O_NONBLOCK; -1 */
	uint64_t device;
	struct kernel_termios termios; /* as last told to the ghost or by it */
	bool pending, background;
	int hint, delay;
	int64_t next_look;
};

static int foreground_group(struct chan *c)
{
	pid_t group = 0;

	if (c->src.fd < 0 || ioctl(c->src.fd, TIOCGPGRP, &group) < 0 || group <= 0)
		return 0;
	return kill(-group, 0) == 0 ? group : 0;
}

bool tty_open(struct chan *c, const int *fds, int n)
{
	struct stat st;
	int one = 1;

	if (n < 2 || fstat(fds[1], &st) < 0)
		return false;
	c->tty = calloc(1, sizeof(*c->tty));
	if (!c->tty)
		return false;
	c->tty->slave = fds[1];
	c->tty->job = n > 2 ? fds[2] : -1;
	c->tty->device = st.st_rdev;
	c->records = true;
	fcntl(fds[1], F_SETFL, fcntl(fds[1], F_GETFL) | O_NONBLOCK);
	if (ioctl(fds[0], TCGETS, &c->tty->termios) < 0 || ioctl(fds[0], TIOCPKT, &one) < 0)
		return false;
	struct kernel_termios t = c->tty->termios;
	t.lflag |= K_EXTPROC;
	c->tty->termios.lflag &= ~K_EXTPROC;
	ioctl(fds[0], TCSETS, &t);
	/* The job sets what it once saw at home, without EXTPROC. To put that back afterwards could undo what the job does next. */
	struct kernel_termios locked = { .lflag = K_EXTPROC };
	ioctl(fds[0], TIOCSLCKTRMIOS, &locked);
	port_open(&c->src, fds[0], chan_src_event, c);
	port_open(&c->sink, fcntl(fds[0], F_DUPFD_CLOEXEC, 0), chan_sink_event, c);
	return true;
}

void tty_free(struct chan *c)
{
	if (c->tty->slave >= 0)
		close(c->tty->slave);
	if (c->tty->job >= 0)
		close(c->tty->job);
	free(c->tty);
	c->tty = NULL;
}

/* ---- output and settings ---- */

static void check_termios(struct chan *c)
{
	struct kernel_termios t;

	if (ioctl(c->src.fd, TCGETS, &t) < 0)
		return;
	if (!(t.lflag & K_EXTPROC)) { /* it could not be locked */
		t.lflag |= K_EXTPROC;
		ioctl(c->src.fd, TCSETS, &t);
	}
	t.lflag &= ~K_EXTPROC;
	if (memcmp(&t, &c->tty->termios, sizeof(t)) == 0)
		return;
	c->tty->termios = t;
	c->stream->settings++;
	frame_put(c->stream, F_TERMIOS, c->id, &t, sizeof(t));
}

static void put_output(struct chan *c, const uint8_t *data, size_t n)
{
	frame_put(c->stream, F_DATA, c->id, data, n);
	c->credit -= n < c->credit ? n : c->credit;
}

bool tty_pump(struct chan *c)
{
	static uint8_t data[TTY_MAX + 1];

	while (c->stream->open && c->src.fd >= 0 && !c->src_end && !c->stream->splice_left) {
		if (chan_allowance(c) <= TTY_MAX || !(c->src.ready || c->draining))
			return true;
		ssize_t r = read(c->src.fd, data, sizeof(data));

		if (r > 0 && data[0] == 0 /* TIOCPKT_DATA */) {
			/* The kernel looks for news before it waits for data: these may be newer. A prompt must not be
			 * seen before what was set for it. */
			check_termios(c);
			if (r > 1)
				put_output(c, data + 1, r - 1);
		} else if (r > 0) {
			if (data[0] & TIOCPKT_FLUSHREAD)
				frame_put(c->stream, F_FLUSH, c->id, NULL, 0);
			if (data[0] & TIOCPKT_IOCTL)
				check_termios(c);
		} else if (r < 0 && errno == EINTR) {
			continue;
		} else if (r < 0 && errno == EAGAIN) {
			c->src.ready = c->draining = false;
		} else { /* EIO: no slave is open any more */
			c->src_end = c->eof_sent = true;
			frame_put_u32(c->stream, F_EOF, c->id, 0);
			chan_sink_gone(c);
		}
	}
	c->draining = false;
	return true;
}

/* ---- input ---- */

/* Bytes the job has not read yet. poll(2) first: it waits for the kernel's worker that carries written bytes over;
 * without it they would not be counted, and a reader about to be woken would be taken for one that wants more.
 */
static int unread_bytes(const struct tty *t)
{
	struct pollfd p = { .fd = t->slave, .events = POLLIN };
	int unread = 0;

	if (t->slave < 0)
		return 0;
	poll(&p, 1, 0);
	return ioctl(t->slave, FIONREAD, &unread) == 0 ? unread : 0;
}

/* A reader may wait for more than is there: VMIN of noncanonical mode. */
static bool all_read(const struct tty *t)
{
	int least = t->termios.lflag & K_ICANON ? 1 : t->termios.cc[VMIN_INDEX];

	return unread_bytes(t) < (least > 1 ? least : 1);
}

/* Each record is one read(2) of the real terminal, and becomes one here: a line stays a line. */
void tty_flush(struct chan *c)
{
	uint16_t n;

	while (c->sink.fd >= 0 && c->out.len >= sizeof(n)) {
		memcpy(&n, buf_head(&c->out), sizeof(n));
		if (c->out.len < sizeof(n) + n)
			return;
		if (!all_read(c->tty))
			return;
		ssize_t r = 0;
		if (n)
			r = write(c->sink.fd, buf_head(&c->out) + sizeof(n), n);
		else if (c->tty->termios.lflag & K_ICANON)
			r = write(c->sink.fd, &c->tty->termios.cc[VEOF_INDEX], 1); /* makes a read of length 0 */
		if (r < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		buf_drop(&c->out, sizeof(n) + n);
		chan_eat(c, n);
	}
}

void tty_take_back(struct chan *c)
{
	static uint8_t data[TTY_MAX];
	uint16_t n;
	ssize_t r;

	while (unread_bytes(c->tty)) {
		r = read(c->tty->slave, data, sizeof(data));
		if (r < 0)
			break;
		frame_put(c->stream, F_BACK, c->id, data, r);
	}
	while (c->out.len >= sizeof(n)) {
		memcpy(&n, buf_head(&c->out), sizeof(n));
		frame_put(c->stream, F_BACK, c->id, buf_head(&c->out) + sizeof(n), n);
		buf_drop(&c->out, sizeof(n) + n);
	}
}

/* The job has ended: do not keep the terminal open ourselves. */
void tty_over(struct chan *c)
{
	if (c->tty->slave >= 0)
		close(c->tty->slave);
	if (c->tty->job >= 0)
		close(c->tty->job);
	c->tty->slave = c->tty->job = -1;
}

void tty_hang_up(struct chan *c)
{
	port_close(&c->sink);
	port_close(&c->src);
}

/* Looks whether the job waits for input: only while there is some, or in the background, for its SIGTTIN. */
int64_t tty_tick(struct chan *c, int64_t now)
{
	struct tty *t = c->tty;
	uint32_t most = 0;

	if (c->src.fd < 0 || c->sink.fd < 0)
		return INT64_MAX;
	if (c->out.len) {
		tty_flush(c);
		if (c->out.len)
			return now + RECORD_MS;
	}
	if (!t->pending && !t->background)
		return INT64_MAX;
	if (now < t->next_look)
		return t->next_look;
	if (all_read(t)) {
		if (t->job >= 0 && !t->background && (fcntl(t->job, F_GETFL) & O_NONBLOCK))
			most = 64; /* never seen waiting */
		else
			most = reader_waits(t->device, foreground_group(c), &t->hint, t->termios.lflag & K_ICANON);
	}
	if (most) {
		frame_put_u32(c->stream, F_WANT, c->id, most);
		t->pending = false;
	}
	t->delay = t->delay * 2 < WANT_MAX_MS ? t->delay * 2 : WANT_MAX_MS;
	t->next_look = now + (t->background ? BACKGROUND_MS : t->delay);
	return t->pending || t->background ? t->next_look : INT64_MAX;
}

static void set_winsize(struct chan *c, const uint8_t *data)
{
	struct winsize size, old = { 0 };

	memcpy(&size, data, sizeof(size));
	ioctl(c->src.fd, TIOCGWINSZ, &old);
	if (memcmp(&size, &old, sizeof(size)) == 0)
		return;
	ioctl(c->src.fd, TIOCSWINSZ, &size);
	if (!foreground_group(c) && old.ws_row)
		frame_put_u32(c->stream, F_NOSIG, c->id, SIGWINCH);
}

/* What the job has set meanwhile counts, be it on its way to the ghost or still to be told. */
static bool is_newer_here(struct chan *c, const uint8_t *data)
{
	struct kernel_termios now;
	uint32_t seen;

	memcpy(&seen, data + sizeof(now), sizeof(seen));
	if (seen != c->stream->settings || ioctl(c->src.fd, TCGETS, &now) < 0)
		return true;
	now.lflag &= ~K_EXTPROC;
	return memcmp(&now, &c->tty->termios, sizeof(now)) != 0;
}

static void set_termios(struct chan *c, const uint8_t *data)
{
	struct kernel_termios t;

	if (is_newer_here(c, data))
		return;
	memcpy(&t, data, sizeof(t));
	t.lflag &= ~K_EXTPROC;
	t.cflag = c->tty->termios.cflag; /* speed and character size belong to the real line */
	if (memcmp(&t, &c->tty->termios, sizeof(t)) == 0)
		return; /* setting it again could undo what the job sets right now */
	c->tty->termios = t;
	t.lflag |= K_EXTPROC;
	ioctl(c->src.fd, TCSETS, &t);
}

bool tty_frame(struct chan *c, const struct frame *h, const uint8_t *data)
{
	uint32_t value = 0;

	if (h->len >= sizeof(value))
		memcpy(&value, data, sizeof(value));
	switch (h->type) {
	case F_PENDING:
		c->tty->pending = true;
		c->tty->delay = WANT_MIN_MS;
		c->tty->next_look = 0;
		return true;
	case F_FOREGROUND:
		c->tty->background = !value;
		c->tty->pending = false;
		c->tty->next_look = now_ms() + BACKGROUND_MS;
		return true;
	case F_TERMIOS:
		if (h->len != sizeof(struct kernel_termios) + sizeof(uint32_t))
			return false;
		set_termios(c, data);
		return true;
	case F_WINSIZE:
		if (h->len != sizeof(struct winsize))
			return false;
		set_winsize(c, data);
		return true;
	case F_TTYSIG:
		if (!foreground_group(c) || ioctl(c->src.fd, TIOCSIG, value) < 0)
			frame_put_u32(c->stream, F_NOSIG, c->id, value);
		return true;
	}
	return false;
}
