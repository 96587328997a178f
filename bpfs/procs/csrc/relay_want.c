/* relay_want.c - who is at a terminal: does anybody wait to read from it? Told by /proc/PID/task/TID/syscall (proc(5)).
 *
 * Typed bytes stay in the real terminal until somebody on the node waits for them, since whoever reads next, be it
 * the user's shell, has a right to them. A reader waits in read(2) or in poll, select or epoll with the terminal
 * among its descriptors.
 */
#define _GNU_SOURCE
#include "relay.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

#define POLL_BYTES 64 /* a poller tells not how much it will read: a paste, an escape sequence */

static ssize_t read_file(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t r = fd < 0 ? -1 : read(fd, text, size - 1);

	if (fd >= 0)
		close(fd);
	text[r > 0 ? r : 0] = 0;
	return r;
}

struct look {
	uint64_t device;
	bool own; /* the processes belong to the terminal's foreground: /dev/tty means this terminal, too */
	int pid;
};

static bool is_terminal(const struct look *l, unsigned long fd)
{
	char path[64];
	struct stat st;

	if (fd > 1u << 20)
		return false;
	snprintf(path, sizeof(path), "/proc/%d/fd/%lu", l->pid, fd);
	return stat(path, &st) == 0 && S_ISCHR(st.st_mode) &&
	       (st.st_rdev == l->device || (l->own && st.st_rdev == makedev(5, 0)));
}

static bool copy_in(const struct look *l, unsigned long from, void *to, size_t n)
{
	struct iovec here = { to, n }, there = { (void *)from, n };

	return process_vm_readv(l->pid, &here, 1, &there, 1, 0) == (ssize_t)n;
}

static bool polls(const struct look *l, unsigned long array, unsigned long n)
{
	struct pollfd p;

	for (unsigned long i = 0; i < n && i < 64; i++)
		if (copy_in(l, array + i * sizeof(p), &p, sizeof(p)) && p.fd >= 0 && (p.events & POLLIN) &&
		    is_terminal(l, p.fd))
			return true;
	return false;
}

static bool selects(const struct look *l, unsigned long n, unsigned long set)
{
	unsigned long word;

	for (unsigned long base = 0; set && base < n && base < 1024; base += 64) {
		if (!copy_in(l, set + base / 8, &word, sizeof(word)))
			return false;
		for (unsigned long bit = 0; bit < 64 && base + bit < n; bit++)
			if (word >> bit & 1 && is_terminal(l, base + bit))
				return true;
	}
	return false;
}

static bool epolls(const struct look *l, unsigned long fd)
{
	char path[64], text[4096], *at = text;
	unsigned target, events;

	snprintf(path, sizeof(path), "/proc/%d/fdinfo/%lu", l->pid, fd);
	if (read_file(path, text, sizeof(text)) <= 0)
		return false;
	while ((at = strstr(at, "tfd:"))) {
		if (sscanf(at, "tfd: %u events: %x", &target, &events) == 2 && (events & EPOLLIN) &&
		    is_terminal(l, target))
			return true;
		at += 4;
	}
	return false;
}

static uint32_t thread_waits(const struct look *l, int tid, bool lines)
{
	char path[64], text[256];
	unsigned long nr, a[3];
	bool found = false;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/syscall", l->pid, tid);
	if (read_file(path, text, sizeof(text)) <= 0 || sscanf(text, "%lu %lx %lx %lx", &nr, &a[0], &a[1], &a[2]) != 4)
		return 0;
	switch (nr) {
	case SYS_read:
		return is_terminal(l, a[0]) ? (a[2] && a[2] < TTY_MAX ? a[2] : TTY_MAX) : 0;
	case SYS_readv:
		return is_terminal(l, a[0]) ? TTY_MAX : 0;
	case SYS_poll:
	case SYS_ppoll:
		found = polls(l, a[0], a[1]);
		break;
	case SYS_select:
	case SYS_pselect6:
		found = selects(l, a[0], a[1]);
		break;
	case SYS_epoll_wait:
	case SYS_epoll_pwait:
	case 441: /* epoll_pwait2, Linux 5.11 */
		found = epolls(l, a[0]);
		break;
	}
	return !found ? 0 : lines ? TTY_MAX : POLL_BYTES;
}

static uint32_t process_waits(struct look *l, int pid, int group, bool lines)
{
	char path[64], text[512], *end;
	uint32_t most = 0;
	struct dirent *e;
	char state;
	int parent, pgrp;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	if (read_file(path, text, sizeof(text)) <= 0 || !(end = strrchr(text, ')')) ||
	    sscanf(end + 1, " %c %d %d", &state, &parent, &pgrp) != 3)
		return 0;
	/* A stopped one still shows the call it will go on with. */
	if ((group && pgrp != group) || (state != 'S' && state != 'R'))
		return 0;
	l->pid = pid;
	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	DIR *d = opendir(path);
	while (d && !most && (e = readdir(d)))
		if (e->d_name[0] != '.')
			most = thread_waits(l, atoi(e->d_name), lines);
	if (d)
		closedir(d);
	return most;
}

uint32_t reader_waits(uint64_t device, int group, int *hint, bool lines)
{
	struct look l = { .device = device, .own = group > 0 };
	uint32_t most = *hint ? process_waits(&l, *hint, group, lines) : 0;
	struct dirent *e;
	DIR *d;

	if (most || !(d = opendir("/proc")))
		return most;
	while (!most && (e = readdir(d))) {
		int pid = atoi(e->d_name);

		if (pid > 0 && pid != getpid() && (most = process_waits(&l, pid, group, lines)))
			*hint = pid;
	}
	closedir(d);
	return most;
}

/* The last of the numbers after `NSpgid:` in /proc/PID/status. */
static uint32_t own_group(int pid)
{
	char path[64], text[4096];

	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	if (read_file(path, text, sizeof(text)) <= 0)
		return 0;
	char *at = strstr(text, "\nNSpgid:"), *end = at ? strchr(at + 1, '\n') : NULL;
	if (!end)
		return 0;
	*end = 0;
	char *last = strrchr(at, '\t');
	return last ? (uint32_t)atoi(last) : 0;
}

bool group_lives(uint64_t device, uint32_t group)
{
	unsigned number = (minor(device) & 0xff) | major(device) << 8 | (minor(device) & ~0xffu) << 12; /* new_encode_dev */
	char path[64], text[512], state;
	bool found = false;
	struct dirent *e;
	unsigned tty;
	DIR *d = opendir("/proc");

	while (d && !found && (e = readdir(d))) {
		int pid = atoi(e->d_name);

		snprintf(path, sizeof(path), "/proc/%d/stat", pid);
		char *end = pid > 0 && read_file(path, text, sizeof(text)) > 0 ? strrchr(text, ')') : NULL;
		if (end && sscanf(end + 1, " %c %*d %*d %*d %u", &state, &tty) == 2 && tty == number && state != 'Z' &&
		    state != 'X')
			found = own_group(pid) == group;
	}
	if (d)
		closedir(d);
	return found;
}
