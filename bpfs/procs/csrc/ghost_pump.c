/* ghost_pump.c - what has to go on without the ghost: processes that pump for a job that went home, and the core
 * bit.
 */
#define _GNU_SOURCE
#include "ghost.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static bool write_all(int fd, const uint8_t *data, size_t n)
{
	struct pollfd p = { .fd = fd, .events = POLLOUT };

	while (n) {
		ssize_t r = write(fd, data, n);

		if (r > 0) {
			data += r;
			n -= r;
		} else if (errno == EAGAIN) {
			poll(&p, 1, -1);
		} else if (errno != EINTR) {
			return false;
		}
	}
	return true;
}

/* Writes what is owed, then everything that comes after it, until the end of file. */
static void pump(int from, const struct buf *first, int to)
{
	static uint8_t data[64 << 10];
	struct pollfd p = { .fd = from, .events = POLLIN };
	ssize_t r;

	if (first->len && !write_all(to, first->data + first->off, first->len))
		_exit(0);
	for (;;) {
		r = read(from, data, sizeof(data));
		if (r < 0 && errno == EAGAIN)
			poll(&p, 1, -1);
		else if (r == 0 || (r < 0 && errno != EINTR))
			break;
		else if (r > 0 && !write_all(to, data, r))
			break;
	}
	shutdown(to, SHUT_WR); /* a socket; a pipe closes with this process */
	_exit(0);
}

/* A grandchild, so that it is no child of the process that comes back into this one. */
static int spawn_pump(int from, const struct buf *first, int to)
{
	pid_t child = fork();
	int status;

	if (child < 0)
		return errno;
	if (child > 0) {
		while (waitpid(child, &status, 0) < 0 && errno == EINTR)
			;
		return WIFEXITED(status) ? WEXITSTATUS(status) : EAGAIN;
	}
	child = fork();
	if (child)
		_exit(child < 0 ? errno : 0);
	drop_rights();
	prctl(PR_SET_NAME, "bpfs-pump");
	int low = from < to ? from : to, high = from < to ? to : from;
	if (low > 0)
		syscall(SYS_close_range, 0, low - 1, 0);
	if (high - low > 1)
		syscall(SYS_close_range, low + 1, high - 1, 0);
	syscall(SYS_close_range, high + 1, ~0u, 0);
	sigset_t set;
	sigfillset(&set);
	sigdelset(&set, SIGTERM);
	sigprocmask(SIG_SETMASK, &set, NULL);
	pump(from, first, to);
	return 0;
}

/* Gives the held bytes of one channel to pumps and puts the other end in place of the job's descriptors. */
static int pump_chan(struct chan *c)
{
	bool input = c->access != O_WRONLY, output = c->access != O_RDONLY;
	int ends[2], ours, theirs, err = 0;

	if (chan_bidirectional(c) ? socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0
				  : pipe2(ends, O_CLOEXEC) < 0)
		return errno;
	ours = ends[input]; /* of a pipe the write end for input */
	theirs = ends[!input];
	if (input)
		err = spawn_pump(c->fds[0], &c->back, ours);
	if (output && !err)
		err = spawn_pump(ours, &c->out, c->fds[0]);
	close(ours);
	if (!err) {
		for (int i = 0; i < c->nfds; i++)
			dup2(theirs, c->fds[i]);
		buf_free(&c->back);
		buf_free(&c->out);
		port_close(&c->src);
		port_close(&c->sink);
	}
	close(theirs);
	return err;
}

int pump_all(void)
{
	int err = 0;

	for (int i = 0; i < the_stream.nchans && !err; i++)
		if (!the_chans[i].tty && (the_chans[i].back.len || the_chans[i].out.len))
			err = pump_chan(&the_chans[i]);
	return err;
}

/* Waits for the ghost's death, then removes its core. */
static void clean_up(int gone, const char *where)
{
	struct dirent *e;
	char c;

	syscall(SYS_close_range, 0, gone - 1, 0);
	syscall(SYS_close_range, gone + 1, ~0u, 0);
	(void)!read(gone, &c, 1);
	DIR *d = opendir(where);
	while (d && (e = readdir(d)))
		unlinkat(dirfd(d), e->d_name, 0);
	rmdir(where);
	_exit(0);
}

/* The status word shall have the core bit: the kernel sets it only when it really wrote one. A tiny one (no memory
 * in it) is written into a private directory and removed by a child. Not done when cores go to a program or a fixed
 * place.
 */
void core_prepare(void)
{
	char pattern[2] = "", where[] = "/tmp/bpfs-core-XXXXXX";
	struct rlimit limit;
	int fd = open("/proc/sys/kernel/core_pattern", O_RDONLY | O_CLOEXEC), gone[2];

	if (fd < 0 || read(fd, pattern, 1) != 1 || pattern[0] == '|' || pattern[0] == '/' ||
	    getrlimit(RLIMIT_CORE, &limit) < 0 || !limit.rlim_max || pipe2(gone, O_CLOEXEC) < 0 || !mkdtemp(where) ||
	    chdir(where) < 0)
		return;
	close(fd);
	prctl(PR_SET_DUMPABLE, 1); /* makes the next file its own, too */
	fd = open("/proc/self/coredump_filter", O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, "0", 1) != 1)
		return;
	close(fd);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_CORE, &limit);
	if (fork() == 0)
		clean_up(gone[0], where);
}
