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

#define RECORD_US (5 * MS)      /* a record waits until the job has read the one before */
#define WANT_MIN_US 100       /* between the first two looks for a waiting reader, then doubled: it has just got its CPU */
#define WANT_MAX_US (50 * MS)
#define BACKGROUND_US (250 * MS)
#define LEFT_US (500 * MS)      /* between looks whether an ended job's children have ended */

static int foreground_group(const struct chan *c)
{
	pid_t group = 0;

	if (c->src.fd < 0 || ioctl(c->src.fd, TIOCGPGRP, &group) < 0 || group <= 0)
		return 0;
	return kill(-group, 0) == 0 ? group : 0;
}

/* The kernel does what it does to background jobs: the terminal is its jobs' controlling one. */
bool tty_is_native(const struct line *l)
{
	pid_t session = 0;

	for (struct tty *t = l->seats; t && l->session; t = t->next)
		if (t->chan->src.fd >= 0)
			return ioctl(t->chan->src.fd, TIOCGSID, &session) == 0;
	return false;
}

static bool open_line(struct line *l, int master)
{
	int one = 1;

	if (ioctl(master, TCGETS, &l->termios) < 0 || ioctl(master, TIOCPKT, &one) < 0)
		return false;
	struct kernel_termios t = l->termios;
	t.lflag |= K_EXTPROC;
	l->termios.lflag &= ~K_EXTPROC;
	ioctl(master, TCSETS, &t);
	/* The job sets what it once saw at home, without EXTPROC. To put that back afterwards could undo what the job does next. */
	struct kernel_termios locked = { .lflag = K_EXTPROC };
	ioctl(master, TIOCSLCKTRMIOS, &locked);
	return true;
}

/* fds: master, a slave for us, the job's. */
bool tty_open(struct chan *c, const int *fds, int n, bool session, uint32_t front)
{
	struct stat st;

	if (n < 2 || fstat(fds[1], &st) < 0)
		return false;
	struct line *l = session ? line_find(st.st_rdev) : NULL;
	struct tty *t = calloc(1, sizeof(*t));
	if (!t || (!l && (!(l = line_new(st.st_rdev)) || !open_line(l, fds[0]))))
		return false;
	if (front && ioctl(fds[0], TCGETS, &l->termios) == 0) /* bpslave has set them: no job did */
		l->termios.lflag &= ~K_EXTPROC;
	l->session |= session;
	if (l->slave < 0) {
		l->slave = fds[1];
		fcntl(fds[1], F_SETFL, fcntl(fds[1], F_GETFL) | O_NONBLOCK);
	} else {
		close(fds[1]);
	}
	t->chan = c;
	t->job = n > 2 ? fds[2] : -1;
	t->group = front;
	c->tty = t;
	c->records = true;
	c->src_gate = false;
	port_open(&c->src, fds[0], chan_src_event, c);
	port_open(&c->sink, fcntl(fds[0], F_DUPFD_CLOEXEC, 0), chan_sink_event, c);
	line_sit(l, t);
	return true;
}

void tty_free(struct chan *c)
{
	line_leave(c->tty);
	if (c->tty->job >= 0)
		close(c->tty->job);
	free(c->tty);
	c->tty = NULL;
}

/* ---- output and settings ---- */

static void note_told(struct line *l)
{
	if (!l->told)
		l->told_at = now_us();
	l->told = true;
	l->told_since = l->step == LINE_WAITS;
}

static void check_termios(struct chan *c)
{
	struct kernel_termios t, *known = &c->tty->line->termios;

	if (ioctl(c->src.fd, TCGETS, &t) < 0)
		return;
	if (!(t.lflag & K_EXTPROC)) { /* it could not be locked */
		t.lflag |= K_EXTPROC;
		ioctl(c->src.fd, TCSETS, &t);
	}
	t.lflag &= ~K_EXTPROC;
	if (memcmp(&t, known, sizeof(t)) == 0)
		return;
	*known = t;
	c->stream->settings++;
	frame_put(c->stream, F_TERMIOS, c->id, &t, sizeof(t));
	note_told(c->tty->line);
}

static void put_output(struct chan *c, const uint8_t *data, size_t n)
{
	frame_put(c->stream, F_DATA, c->id, data, n);
	c->credit -= n < c->credit ? n : c->credit;
	note_told(c->tty->line);
}

/* The job has nothing more to say by way of this seat. */
static void get_up(struct chan *c)
{
	if (c->src_end)
		return;
	c->src_end = c->eof_sent = true;
	c->draining = false;
	frame_put_u32(c->stream, F_EOF, c->id, 0);
	chan_sink_gone(c);
}

bool tty_pump(struct chan *c)
{
	static uint8_t data[TTY_MAX + 1];
	struct line *l = c->tty->line;

	if (l->speaker != c->tty) {
		if (c->draining && c->src.fd >= 0 && !c->src_end)
			line_drain(c->tty);
		else
			c->draining = false;
		return true;
	}
	if (l->step == LINE_WAITS && l->heir)
		return true;

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
			line_drained(c->tty);
		} else { /* EIO: no slave is open any more */
			l->ended = true;
			for (struct tty *t = l->seats; t; t = t->next)
				get_up(t->chan);
		}
	}
	c->draining = false;
	return true;
}

/* ---- input ---- */

/* Bytes the job has not read yet. poll(2) first: it waits for the kernel's worker that carries written bytes over;
 * without it they would not be counted, and a reader about to be woken would be taken for one that wants more.
 */
static int unread_bytes(const struct line *l)
{
	struct pollfd p = { .fd = l->slave, .events = POLLIN };
	int unread = 0;

	if (l->slave < 0)
		return 0;
	poll(&p, 1, 0);
	return ioctl(l->slave, FIONREAD, &unread) == 0 ? unread : 0;
}

/* A reader may wait for more than is there: VMIN of noncanonical mode. */
static bool all_read(const struct line *l)
{
	int least = l->termios.lflag & K_ICANON ? 1 : l->termios.cc[VMIN_INDEX];

	return unread_bytes(l) < (least > 1 ? least : 1);
}

/* Each record is one read(2) of the real terminal, and becomes one here: a line stays a line. */
void tty_flush(struct chan *c)
{
	struct line *l = c->tty->line;
	uint16_t n;

	while (c->sink.fd >= 0 && c->out.len >= sizeof(n)) {
		memcpy(&n, buf_head(&c->out), sizeof(n));
		if (c->out.len < sizeof(n) + n)
			return;
		if (!all_read(l))
			return;
		ssize_t r = 0;
		if (n)
			r = write(c->sink.fd, buf_head(&c->out) + sizeof(n), n);
		else if (l->termios.lflag & K_ICANON)
			r = write(c->sink.fd, &l->termios.cc[VEOF_INDEX], 1); /* makes a read of length 0 */
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

	while (line_in_front(c->tty) && unread_bytes(c->tty->line)) {
		r = read(c->tty->line->slave, data, sizeof(data));
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

/* The job has ended: do not keep the terminal open ourselves, once that is so of all. */
void tty_over(struct chan *c, uint32_t group)
{
	struct line *l = c->tty->line;

	c->tty->over = true;
	c->tty->last_group = group;
	if (c->tty->job >= 0)
		close(c->tty->job);
	c->tty->job = -1;
	for (struct tty *t = l->seats; t; t = t->next)
		if (!t->over) {
			line_look(l);
			return;
		}
	if (l->slave >= 0)
		close(l->slave);
	l->slave = -1;
}

/* What an ended job's children in its own group write and read goes by its seat; of others, another's seat sees to it. */
static void leave_to_others(struct chan *c)
{
	struct tty *t = c->tty, *other = t->line->seats;

	while (other && (other == t || other->over || other->chan->src.fd < 0))
		other = other->next;
	if (!other || c->src_end || group_lives(t->line->device, t->last_group))
		return;
	line_foreground(t, 0);
	get_up(c);
	port_close(&c->src);
	line_look(t->line);
}

/* The job's output so far is out. */
void tty_drained(struct chan *c, bool over, bool stops)
{
	if (over)
		leave_to_others(c);
	else if (stops)
		line_sleeps(c->tty);
}

void tty_hang_up(struct chan *c)
{
	if (c->tty->line->slave >= 0)
		ioctl(c->tty->line->slave, TIOCVHANGUP); /* bpslave has the master open, too */
	port_close(&c->sink);
	port_close(&c->src);
	line_look(c->tty->line);
}

static uint32_t wanted(struct chan *c)
{
	struct tty *t = c->tty;

	if (!all_read(t->line))
		return 0;
	if (t->job >= 0 && t->group && (fcntl(t->job, F_GETFL) & O_NONBLOCK))
		return 64; /* never seen waiting */
	return reader_waits(t->line->device, foreground_group(c), &t->hint, t->line->termios.lflag & K_ICANON);
}

static bool tell_native(struct chan *c)
{
	struct tty *t = c->tty;

	if (!t->told_native && tty_is_native(t->line)) {
		t->told_native = true;
		frame_put(c->stream, F_NATIVE, c->id, NULL, 0);
	}
	return t->told_native;
}

/* Looks whether the job waits for input: only while there is some. Where the kernel does not do it by itself, also in the
 * background, for its SIGTTIN. */
int64_t tty_tick(struct chan *c, int64_t now)
{
	struct tty *t = c->tty;
	bool watched = !t->group && !t->told_native && !t->asleep;

	if (c->src.fd < 0 || c->sink.fd < 0)
		return INT64_MAX;
	if (c->out.len) {
		tty_flush(c);
		if (c->out.len)
			return now + RECORD_US;
	}
	if (t->over && t->line->seats->next) {
		if (now >= t->next_look) {
			t->next_look = now + LEFT_US;
			leave_to_others(c);
		}
		return t->next_look;
	}
	if ((!t->pending && !watched) || t->line->settling || line_is_second(t))
		return INT64_MAX;
	if (now < t->next_look)
		return t->next_look;
	/* It may have become so since its ghost spoke last: then who waits here is somebody else. */
	if (watched && tell_native(c) && !t->pending)
		return INT64_MAX;
	uint32_t most = wanted(c);
	if (most) {
		frame_put_u32(c->stream, F_WANT, c->id, most);
		t->pending = false;
	}
	t->next_look = now + (watched ? BACKGROUND_US : t->delay);
	t->delay = t->delay * 2 < WANT_MAX_US ? t->delay * 2 : WANT_MAX_US;
	return t->pending || watched ? t->next_look : INT64_MAX;
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
	return memcmp(&now, &c->tty->line->termios, sizeof(now)) != 0;
}

static void set_termios(struct chan *c, const uint8_t *data)
{
	struct kernel_termios t, *known = &c->tty->line->termios;

	if (line_is_taken(c->tty) || is_newer_here(c, data))
		return;
	memcpy(&t, data, sizeof(t));
	t.lflag &= ~K_EXTPROC;
	t.cflag = known->cflag; /* speed and character size belong to the real line */
	if (memcmp(&t, known, sizeof(t)) == 0)
		return; /* setting it again could undo what the job sets right now */
	*known = t;
	t.lflag |= K_EXTPROC;
	ioctl(c->src.fd, TCSETS, &t);
}

void tty_type(struct line *l, int signo)
{
	for (struct tty *t = l->seats; t; t = t->next)
		if (t->chan->src.fd >= 0) {
			if (!foreground_group(t->chan) || ioctl(t->chan->src.fd, TIOCSIG, signo) < 0)
				frame_put_u32(t->chan->stream, F_NOSIG, t->chan->id, signo);
			return;
		}
}

static void typed(struct chan *c, uint32_t signo)
{
	struct line *l = c->tty->line;

	if (line_is_second(c->tty))
		return;
	if (l->settling && signo < 32)
		l->typed |= 1u << signo;
	else if (!foreground_group(c) || ioctl(c->src.fd, TIOCSIG, signo) < 0)
		frame_put_u32(c->stream, F_NOSIG, c->id, signo);
}

static void foreground(struct chan *c, uint32_t group)
{
	struct tty *t = c->tty;

	t->pending = false;
	t->next_look = now_us() + BACKGROUND_US;
	tell_native(c);
	line_foreground(t, group);
}

bool tty_frame(struct chan *c, const struct frame *h, const uint8_t *data)
{
	uint32_t value = 0;

	if (h->len >= sizeof(value))
		memcpy(&value, data, sizeof(value));
	switch (h->type) {
	case F_PENDING:
		c->tty->pending = true;
		c->tty->delay = WANT_MIN_US;
		c->tty->next_look = 0;
		return true;
	case F_FOREGROUND:
		foreground(c, value);
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
		typed(c, value);
		return true;
	case F_SYNCED:
		line_synced(c->tty, value);
		return true;
	}
	return false;
}
