/* ghost_tty.c - the real terminal of a job that runs elsewhere.
 *
 * The real terminal does all of the processing: echo, line editing, signals, output. The pseudo-terminal on the node
 * passes bytes on untouched (EXTPROC) and reports what the job sets with tcsetattr; that is set here as it is, and
 * stays set, as a local job's would. Typed bytes belong to whoever reads next: they are taken only when the job
 * waits for them (F_PENDING, F_WANT) and the ghost is in the terminal's foreground group.
 */
#define _GNU_SOURCE
#include "ghost.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef TIOCGPGRP
#define TIOCGPGRP 0x540F
#define TIOCSPGRP 0x5410
#endif

#define STALE_MS 300
#define STALE_MOST 3 /* so many in a row: the kernel's there, ours, and one that was on its way before SIGCONT */

static int tty_fd(const struct chan *c)
{
	return c->src.fd >= 0 ? c->src.fd : c->sink.fd;
}

static bool in_foreground(struct chan *c)
{
	pid_t group = 0;
	int fd = tty_fd(c);

	/* ENOTTY: not our controlling terminal, no job control: anybody may read. */
	c->tty->controlling = fd >= 0 && ioctl(fd, TIOCGPGRP, &group) == 0;
	return !c->tty->controlling || group == getpgrp();
}

static bool has_child_in(pid_t group)
{
	siginfo_t info;

	return waitid(P_PGID, (id_t)group, &info, WEXITED | WNOHANG | WNOWAIT | __WALL) == 0 || errno != ECHILD;
}

/* A child of ours that is, or was, in this group has stopped or ended. Where the terminal was that group's and it stands
 * still now or has no child of ours left, it is ours: the job is the shell that waited for them, and has taken the terminal
 * on its node. Others may be left: what they have started in the background, and a pump of theirs. Here nobody else does:
 * our signals are blocked, so the kernel lets us. */
void ttys_left(pid_t group, bool stopped)
{
	for (int i = 0; i < the_stream.nchans; i++) {
		pid_t front = 0, own = getpgrp();
		int fd = the_chans[i].tty ? tty_fd(&the_chans[i]) : -1;

		if (fd < 0 || group <= 0 || ioctl(fd, TIOCGPGRP, &front) < 0 || front != group || group == own)
			continue;
		if ((stopped || !has_child_in(group)) && ioctl(fd, TIOCSPGRP, &own) == 0) {
			the_chans[i].tty->changed |= the_chans[i].tty->missed; /* the job has been quicker than we */
			ttys_refresh(false);
		}
	}
}

static bool told_background; /* the job was sent SIGTTIN or SIGTTOU by us, and has not stopped yet */

static void tell_background(int signo)
{
	told_background = true;
	tell(C_SIGNAL, signo, 0x80, 0, 0, 0);
}

/* The job has stopped since it was in the background, which it no longer is: the shell was quicker than the signal, of ours
 * or of the node's kernel, which has heard of the foreground from us. Once in a while only: should it go on like that, let
 * it be stopped. */
bool ttys_stop_is_stale(int signo)
{
	static int64_t next;
	static int lately;
	bool told = told_background, stale = false;

	if (signo != SIGTTIN && signo != SIGTTOU)
		return false;
	told_background = false;
	for (int i = 0; i < the_stream.nchans; i++) {
		struct chan *c = &the_chans[i];

		if (!c->tty || tty_fd(c) < 0)
			continue;
		if (!in_foreground(c))
			return false;
		stale |= told || (c->tty->native && c->tty->controlling && (now_ms() >= next || lately < STALE_MOST));
	}
	if (stale) {
		lately = now_ms() < next ? lately + 1 : 1;
		next = now_ms() + STALE_MS;
	}
	return stale;
}

void tty_init(struct chan *c)
{
	c->tty = calloc(1, sizeof(*c->tty));
	if (!c->tty)
		_exit(255);
}

static void put_winsize(struct chan *c)
{
	if (ioctl(tty_fd(c), TIOCGWINSZ, &c->tty->size) == 0)
		frame_put(c->stream, F_WINSIZE, c->id, &c->tty->size, sizeof(c->tty->size));
}

static void put_termios(struct chan *c)
{
	struct {
		struct kernel_termios now;
		uint32_t seen;
	} data = { .seen = c->stream->settings };

	if (ioctl(tty_fd(c), TCGETS, &data.now) < 0)
		return;
	c->tty->pushed = data.now;
	frame_put(c->stream, F_TERMIOS, c->id, &data, sizeof(data));
}

/* What others do to the terminal meanwhile counts for background jobs as well: `stty tostop`, a new size. */
static void push_news(struct chan *c)
{
	struct kernel_termios now;
	struct winsize size;

	if (ioctl(tty_fd(c), TCGETS, &now) == 0 && memcmp(&now, &c->tty->pushed, sizeof(now)) != 0)
		put_termios(c);
	if (ioctl(tty_fd(c), TIOCGWINSZ, &size) == 0 && memcmp(&size, &c->tty->size, sizeof(size)) != 0)
		put_winsize(c);
}

/* The real terminal's settings are the truth: the shell may have changed them while the job was not in front. */
static void push_state(struct chan *c)
{
	if (c->tty->changed)
		tty_settle(c);
	else
		put_termios(c);
}

static void refresh(struct chan *c, bool force)
{
	struct tty *t = c->tty;
	bool front = in_foreground(c);

	if (front == t->foreground && !force) {
		if (!front && t->native)
			push_news(c);
		return;
	}
	t->foreground = front;
	t->pending = t->missed = false;
	t->want = 0;
	c->src_gate = front;
	frame_put_u32(c->stream, F_FOREGROUND, c->id, !front ? 0 : t->controlling ? getpgrp() : 1);
	if (front) {
		c->sink_gate = false;
		push_state(c);
		put_winsize(c);
	}
	stream_mark(c->stream);
}

void ttys_refresh(bool force)
{
	for (int i = 0; i < the_stream.nchans; i++)
		if (the_chans[i].tty && tty_fd(&the_chans[i]) >= 0)
			refresh(&the_chans[i], force);
}

/* A new stream: tell the node how the terminal is, wherever we stand. */
void ttys_greet(void)
{
	for (int i = 0; i < the_stream.nchans; i++) {
		struct chan *c = &the_chans[i];

		if (!c->tty || tty_fd(c) < 0)
			continue;
		c->tty->native = false;
		if (!c->tty->changed)
			put_termios(c);
		put_winsize(c);
		refresh(c, true);
	}
}

static void answer_sync(struct chan *c)
{
	frame_put_u32(c->stream, F_SYNCED, c->id, c->tty->sync);
	c->tty->sync = 0;
}

/* The terminal's output so far came by our stream; what comes next may come by another job's. */
void tty_sync(struct chan *c, uint32_t token)
{
	struct tty *t = c->tty;

	if (t->sync != token)
		t->sync_after = c->out.len;
	t->sync = token;
	if (!t->sync_after || !c->out.len)
		answer_sync(c);
	else
		frame_put_u32(c->stream, F_SYNCED, c->id, 0);
}

bool ttys_barred(void)
{
	for (int i = 0; i < the_stream.nchans; i++)
		if (the_chans[i].tty && the_chans[i].sink_gate && the_chans[i].out.len)
			return true;
	return false;
}

bool ttys_in_background(void)
{
	for (int i = 0; i < the_stream.nchans; i++)
		if (the_chans[i].tty && tty_fd(&the_chans[i]) >= 0 && !the_chans[i].tty->foreground)
			return true;
	return false;
}

/* A signal that was typed goes to the foreground group on the node. */
bool ttys_signal(int signo)
{
	if (!the_stream.open || the_stream.held)
		return false;
	for (int i = 0; i < the_stream.nchans; i++) {
		struct chan *c = &the_chans[i];

		if (!c->tty || tty_fd(c) < 0)
			continue;
		/* It may have come to the foreground just now, without a SIGCONT. That it has left it again, for a job whose leader
		 * has stopped already, is not to be told before the signal is. */
		if (!c->tty->foreground && in_foreground(c))
			refresh(c, false);
		if (c->tty->native && !c->tty->foreground)
			return false;
		if (c->tty->controlling) {
			frame_put_u32(&the_stream, F_TTYSIG, c->id, signo);
			return true;
		}
	}
	return false;
}

void ttys_winsize(void)
{
	for (int i = 0; i < the_stream.nchans; i++)
		if (the_chans[i].tty && tty_fd(&the_chans[i]) >= 0) {
			refresh(&the_chans[i], false);
			put_winsize(&the_chans[i]);
		}
}

/* ---- output and settings ---- */

void tty_settle(struct chan *c)
{
	struct tty *t = c->tty;
	struct kernel_termios real, want = t->termios;

	if (!t->changed || !t->foreground || (t->before && c->out.len) || tty_fd(c) < 0)
		return;
	t->changed = false;
	t->before = 0;
	if (ioctl(tty_fd(c), TCGETS, &real) < 0)
		return;
	want.lflag = (want.lflag & ~K_EXTPROC) | (real.lflag & K_EXTPROC);
	want.cflag = real.cflag; /* speed and character size belong to the real line */
	if (memcmp(&want, &real, sizeof(want)) != 0)
		ioctl(tty_fd(c), TCSETS, &want);
}

void tty_set(struct chan *c, const struct kernel_termios *t)
{
	c->stream->settings++;
	c->tty->termios = *t;
	c->tty->missed = c->tty->native && !in_foreground(c);
	if (c->tty->missed)
		return; /* not ours: the terminal is shared, and whose it is sets it */
	c->tty->changed = true;
	c->tty->before = c->out.len;
	if (!in_foreground(c) && c->tty->controlling && !c->tty->native && now_ms() >= c->tty->next_ttou) {
		/* As the kernel does to a background process; in the foreground again it is applied. */
		c->tty->next_ttou = now_ms() + 1000;
		tell_background(SIGTTOU);
	}
	tty_settle(c);
}

bool tty_write_barred(struct chan *c)
{
	struct kernel_termios now;

	if (c->tty->foreground || c->tty->native || ioctl(tty_fd(c), TCGETS, &now) < 0 || !(now.lflag & K_TOSTOP) || in_foreground(c))
		return false;
	c->sink_gate = true; /* until refresh() finds us in front */
	if (now_ms() >= c->tty->next_ttou) {
		c->tty->next_ttou = now_ms() + 1000;
		tell_background(SIGTTOU);
	}
	return true;
}

/* How much of the output can be left to the terminal's own ONLCR: it has been through that of the pseudo-terminal,
 * which made each \n a \r\n, so one \r before each \n is left out. Ends before a bare \n, which the terminal would
 * spoil. Returns bytes taken; *out of them are to be written. With a limit: only so far as `limit` bytes come out.
 */
static size_t plain_part(const uint8_t *data, size_t n, uint8_t *text, size_t *out, size_t limit)
{
	bool cr = false;
	size_t i = 0;

	for (*out = 0; i < n && *out < limit; i++) {
		if (data[i] == '\n' && !cr)
			break;
		cr = data[i] == '\r';
		if (!(cr && i + 1 < n && data[i + 1] == '\n'))
			text[(*out)++] = data[i];
	}
	return i;
}

/* Up to the next \r\n, where the terminal may do it by itself again. */
static size_t exact_part(const uint8_t *data, size_t n)
{
	for (size_t i = 1; i < n; i++)
		if (data[i] == '\n' && data[i - 1] == '\r')
			return i > 1 ? i - 1 : n;
	return n;
}

/* Output that has been processed on the node must not be processed again. Only in the foreground are the terminal's
 * settings ours to change for the moment of a write; in the background the shell may be changing them right now.
 */
static ssize_t write_exactly(struct chan *c, const struct kernel_termios *real, const uint8_t *data, size_t n)
{
	struct kernel_termios off = *real;

	if (!c->tty->foreground)
		return write(c->sink.fd, data, n);
	off.oflag &= ~K_OPOST;
	ioctl(c->sink.fd, TCSETS, &off);
	ssize_t r = write(c->sink.fd, data, n);
	int err = errno;
	ioctl(c->sink.fd, TCSETS, real);
	errno = err;
	return r;
}

static ssize_t write_processed(struct chan *c, const uint8_t *data, size_t n)
{
	struct kernel_termios real;
	uint8_t text[TTY_MAX];
	size_t out;
	ssize_t r;

	if (ioctl(c->sink.fd, TCGETS, &real) < 0 || !(real.oflag & K_OPOST) || !(real.oflag & (K_ONLCR | K_ODD))) {
		r = write(c->sink.fd, data, n);
	} else if ((real.oflag & K_ODD) || !plain_part(data, n, text, &out, sizeof(text))) {
		r = write_exactly(c, &real, data, real.oflag & K_ODD ? n : exact_part(data, n));
	} else {
		r = write(c->sink.fd, text, out);
		if (r > 0)
			r = plain_part(data, n, text, &out, r);
	}
	return r;
}

/* Output and changes of settings keep their order: who sees a prompt may count on what the shell has set for it. */
ssize_t tty_write(struct chan *c, const uint8_t *data, size_t n)
{
	struct tty *t = c->tty;

	tty_settle(c);
	if (n > TTY_MAX)
		n = TTY_MAX;
	if (t->changed && t->before && n > t->before)
		n = t->before;
	ssize_t r = write_processed(c, data, n);
	if (r <= 0)
		return r;
	t->before -= (size_t)r < t->before ? (size_t)r : t->before;
	t->sync_after -= (size_t)r < t->sync_after ? (size_t)r : t->sync_after;
	if (t->sync && !t->sync_after)
		answer_sync(c);
	return r;
}

/* ---- input ---- */

static bool hung_up(struct chan *c)
{
	struct pollfd p = { .fd = c->src.fd };

	return poll(&p, 1, 0) == 1 && (p.revents & (POLLHUP | POLLERR));
}

static void read_typed(struct chan *c)
{
	struct tty *t = c->tty;
	uint8_t line[TTY_MAX];
	ssize_t r = read(c->src.fd, line, t->want < sizeof(line) ? t->want : sizeof(line));

	t->pending = false;
	t->want = 0;
	c->src.ready = false;
	c->src_gate = true;
	if (r > 0) {
		frame_put(c->stream, F_DATA, c->id, line, r);
		c->credit -= (uint32_t)r < c->credit ? (uint32_t)r : c->credit;
	} else if (r == 0 && !hung_up(c)) {
		frame_put_u32(c->stream, F_EOF, c->id, 0);
	} else if (r == 0 || (errno != EAGAIN && errno != EINTR)) {
		frame_put(c->stream, F_CLOSED, c->id, NULL, 0); /* the line is gone: hang up over there */
		c->src_end = c->eof_sent = true;
		port_forget(&c->src);
	}
}

/* Sends what is held, one record a frame, then what is typed and wanted. */
bool tty_pump(struct chan *c)
{
	struct tty *t = c->tty;
	uint16_t n;

	if (!c->stream->open || c->src.fd < 0)
		return true;
	while (c->back.len >= sizeof(n)) {
		memcpy(&n, buf_head(&c->back), sizeof(n));
		if (c->credit < n)
			return true;
		if (n)
			frame_put(c->stream, F_DATA, c->id, buf_head(&c->back) + sizeof(n), n);
		else
			frame_put_u32(c->stream, F_EOF, c->id, 0);
		c->credit -= n;
		buf_drop(&c->back, sizeof(n) + n);
	}
	if (c->src_end || !t->foreground || c->credit < TTY_MAX)
		return true;
	if (t->want) {
		if (in_foreground(c))
			read_typed(c);
		else
			refresh(c, false);
	} else if (c->src.ready && !t->pending) {
		t->pending = true;
		c->src_gate = false; /* no need to hear of it again */
		c->src.ready = false;
		frame_put(c->stream, F_PENDING, c->id, NULL, 0);
	}
	return true;
}

void tty_want(struct chan *c, uint32_t most)
{
	struct tty *t = c->tty;

	refresh(c, false);
	if (t->foreground) {
		if (t->pending)
			t->want = most ? most : TTY_MAX;
		return;
	}
	if (now_ms() >= t->next_ttin) {
		t->next_ttin = now_ms() + 1000;
		tell_background(SIGTTIN);
	}
}

/* Unread bytes go back to the terminal for the next reader. Not echoed again; refused by kernels without legacy TIOCSTI
 * unless privileged: then they stay in `back`. */
void tty_give_back(struct chan *c)
{
	struct kernel_termios old, quiet;
	uint16_t n;
	int fd = tty_fd(c);
	bool ok = true;

	if (!c->back.len || ioctl(fd, TCGETS, &old) < 0)
		return;
	quiet = old;
	quiet.lflag &= ~K_ECHO;
	ioctl(fd, TCSETS, &quiet);
	while (ok && c->back.len >= sizeof(n)) {
		memcpy(&n, buf_head(&c->back), sizeof(n));
		for (int i = 0; ok && i < n; i++)
			ok = ioctl(fd, TIOCSTI, buf_head(&c->back) + sizeof(n) + i) == 0;
		if (ok && !n)
			ok = ioctl(fd, TIOCSTI, &old.cc[4 /* VEOF */]) == 0;
		if (ok)
			buf_drop(&c->back, sizeof(n) + n);
	}
	ioctl(fd, TCSETS, &old);
}

void tty_discard(struct chan *c)
{
	if (c->tty->foreground && c->src.fd >= 0)
		ioctl(c->src.fd, 0x540B /* TCFLSH */, 0 /* TCIFLUSH */);
}
