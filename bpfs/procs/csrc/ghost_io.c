/* ghost_io.c - the job's own descriptors, in the hands of its ghost.
 *
 * They are shared with the user's shell and others: O_NONBLOCK may not be set on them. Sockets take MSG_DONTWAIT.
 * Pipes and terminals are opened a second time, nonblocking. That fails when they belong to another user: then
 * RWF_NOWAIT (pipes, Linux 6.5, and not after any splice(2), which clears the ability), else at most PIPE_BUF bytes
 * at a time, which do not block after POLLOUT unless another writer is quicker.
 */
#define _GNU_SOURCE
#include "ghost.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define NOWAIT 8 /* RWF_NOWAIT, uapi/linux/fs.h */
#define ATOMIC 4096

struct stream the_stream = { .tcp.fd = -1, .way = { -1, -1 } };
struct chan the_chans[MAX_CHANS];

int high_fd(int fd)
{
	int high = fcntl(fd, F_DUPFD_CLOEXEC, 200);

	return high >= 0 ? high : fcntl(fd, F_DUPFD_CLOEXEC, 3);
}

/* A second, nonblocking open file of the same pipe or terminal; else a plain duplicate. */
static int second_open(int fd, int flags)
{
	char path[32] = "/proc/self/fd/";
	char digits[12];
	int n = 0, v = fd;

	do
		digits[n++] = '0' + v % 10;
	while (v /= 10);
	for (size_t i = strlen(path); n; )
		path[i++] = digits[--n];
	int again = open(path, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	if (again < 0)
		return high_fd(fd);
	int high = high_fd(again);
	close(again);
	return high;
}

static void open_end(struct chan *c, struct port *p, int mode, void (*call)(struct port *, uint32_t))
{
	struct stat st;
	int fd = c->fds[0];

	if (fstat(fd, &st) < 0)
		return;
	if (S_ISREG(st.st_mode))
		c->kind = K_FILE;
	if (c->kind == K_TTY)
		fd = second_open(fd, c->access);
	else if (S_ISFIFO(st.st_mode))
		fd = second_open(fd, mode);
	else
		fd = high_fd(fd);
	port_open(p, fd, call, c);
	c->may_splice = S_ISFIFO(st.st_mode) && (fcntl(fd, F_GETFL) & O_NONBLOCK);
	if (mode == O_WRONLY)
		c->sink_pipe = c->may_splice;
	else
		p->ready = c->may_splice; /* a FIFO that has no writers would not tell by an event */
}

static void open_chan(struct chan *c, const struct chan_record *r, const int32_t *fds)
{
	chan_init(c, &the_stream);
	c->id = r->chan;
	c->kind = r->kind;
	c->access = r->access;
	c->nfds = r->nfds;
	memcpy(c->fds, fds, r->nfds * sizeof(*fds));
	c->window = OUTPUT_WINDOW;
	if (c->kind == K_TTY)
		tty_init(c);
	if (c->access != O_WRONLY)
		open_end(c, &c->src, O_RDONLY, chan_src_event);
	if (c->access != O_RDONLY)
		open_end(c, &c->sink, O_WRONLY, chan_sink_event);
}

/* Reads a channel table. Channels known from an earlier stream keep their state. */
int stream_table(const uint8_t *text, size_t len)
{
	struct chan_record r;
	int32_t fds[MAX_FDS];

	while (len >= sizeof(r)) {
		memcpy(&r, text, sizeof(r));
		if (!r.nfds || r.nfds > MAX_FDS || len < sizeof(r) + r.nfds * sizeof(*fds))
			return EINVAL;
		memcpy(fds, text + sizeof(r), r.nfds * sizeof(*fds));
		text += sizeof(r) + r.nfds * sizeof(*fds);
		len -= sizeof(r) + r.nfds * sizeof(*fds);
		if (chan_find(&the_stream, r.chan))
			continue;
		if (the_stream.nchans == MAX_CHANS)
			return EINVAL;
		the_stream.chans = the_chans;
		open_chan(&the_chans[the_stream.nchans], &r, fds);
		the_stream.nchans++;
	}
	return len ? EINVAL : 0;
}

/* The other side may write as far as there is room here. */
void stream_grant_all(void)
{
	for (int i = 0; i < the_stream.nchans; i++) {
		struct chan *c = &the_chans[i];

		c->granted = c->eaten = 0;
		if (c->sink_gone)
			frame_put(&the_stream, F_CLOSED, c->id, NULL, 0);
		else if (c->sink.fd >= 0 && c->out.len < c->window)
			chan_grant(c, c->window - c->out.len);
	}
}

/* After F_HELD: what came back goes to the front. Returns the input bytes that are kept. */
uint64_t take_held(bool home, int *pumps)
{
	uint64_t kept = 0;

	for (int i = 0; i < the_stream.nchans; i++) {
		struct chan *c = &the_chans[i];

		c->credit = 0;
		c->moved = 0;
		if (c->returned.len)
			buf_front(&c->back, buf_head(&c->returned), c->returned.len);
		buf_free(&c->returned);
		if (c->src.fd >= 0)
			c->eof_sent = false;
		/* A file is read again from where the job stopped; others who share the offset see it right, too. */
		if (c->kind == K_FILE && c->back.len && lseek(c->src.fd, -(off_t)c->back.len, SEEK_CUR) >= 0) {
			buf_free(&c->back);
			c->src_end = false;
		}
		if (c->tty && home)
			tty_give_back(c);
		kept += c->back.len;
	}
	*pumps = count_pumps();
	return kept;
}

int count_pumps(void)
{
	int n = 0;

	for (int i = 0; i < the_stream.nchans; i++)
		n += the_chans[i].back.len || the_chans[i].out.len;
	return n;
}

bool all_written(void)
{
	for (int i = 0; i < the_stream.nchans; i++)
		if (the_chans[i].out.len)
			return false;
	return true;
}

/* Does anybody on the node still hold the other end of a channel? */
bool any_alive(void)
{
	if (!the_stream.open)
		return false;
	for (int i = 0; i < the_stream.nchans; i++) {
		struct chan *c = &the_chans[i];

		if ((c->sink.fd >= 0 && !c->out_end) || (c->src.fd >= 0 && !c->src_end))
			return true;
	}
	return false;
}

/* The job has closed it: so does the ghost, and whoever is at the other end sees the end of file. */
void close_copies(struct chan *c)
{
	for (int i = 0; i < c->nfds; i++)
		close(c->fds[i]);
	c->nfds = 0;
	port_close(&c->src);
	port_close(&c->sink);
	c->src_end = c->eof_sent = true;
}

/* ---- hooks of mux.c ---- */

ssize_t side_read(struct chan *c, void *data, size_t n)
{
	struct iovec v = { data, n };
	ssize_t r;

	if (c->kind == K_SOCKET)
		return recv(c->src.fd, data, n, MSG_DONTWAIT);
	if (c->kind == K_FILE || c->may_splice)
		return read(c->src.fd, data, n);
	r = syscall(SYS_preadv2, c->src.fd, &v, 1, -1L, -1L, NOWAIT);
	if (r < 0 && (errno == EOPNOTSUPP || errno == ENOSYS))
		r = read(c->src.fd, data, n);
	return r;
}

ssize_t side_write(struct chan *c, const void *data, size_t n)
{
	struct iovec v = { (void *)data, n };
	ssize_t r;

	if (c->tty && tty_write_barred(c)) {
		errno = EAGAIN;
		return -1;
	}
	if (c->kind == K_SOCKET)
		return send(c->sink.fd, data, n, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (c->tty)
		return tty_write(c, data, n);
	if (c->kind == K_FILE || c->may_splice)
		return write(c->sink.fd, data, n);
	r = syscall(SYS_pwritev2, c->sink.fd, &v, 1, -1L, -1L, NOWAIT);
	if (r < 0 && (errno == EOPNOTSUPP || errno == ENOSYS))
		r = write(c->sink.fd, data, n < ATOMIC ? n : ATOMIC);
	return r;
}

bool side_may_splice_source(struct chan *c)
{
	return c->may_splice;
}

bool side_pump_special(struct chan *c)
{
	return c->tty && tty_pump(c);
}

void side_flush_special(struct chan *c)
{
	(void)c;
}

bool side_watches_sink(const struct chan *c)
{
	(void)c;
	return true;
}

void side_sink_end(struct chan *c)
{
	port_close(&c->sink);
	if (c->kind == K_SOCKET && c->out_shutdown) {
		shutdown(c->fds[0], SHUT_WR);
		return;
	}
	if (c->kind != K_TTY)
		close_copies(c);
	else
		port_close(&c->src);
}

void side_source_closed(struct chan *c, uint64_t consumed)
{
	/* What the job left unread of a file the next reader of the same open file finds. */
	if (c->kind == K_FILE && c->access == O_RDONLY && consumed < c->moved)
		lseek(c->src.fd, -(off_t)(c->moved - consumed), SEEK_CUR);
	if (!chan_bidirectional(c))
		close_copies(c);
}
