/* What a strict job's call says, and of whom.
 * SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#include "callwatch_parts.h"
#include "inside.h"

#include <linux/sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#define PLACEHOLDER "nodeinit"

static bool is_placeholder_name(const char *name)
{
	return !strncmp(name, PLACEHOLDER, sizeof(PLACEHOLDER) - 1);
}

static bool read_name(int folder, const char *path, char *name, size_t size)
{
	int fd = openat(folder, path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, name, size - 1);

	if (fd >= 0)
		close(fd);
	if (n <= 0)
		return false;
	name[n] = 0;
	return true;
}

bool lives_here(int pid)
{
	char path[32], name[24];

	snprintf(path, sizeof(path), "%d/comm", pid);
	return read_name(proc_fd, path, name, sizeof(name)) && !is_placeholder_name(name);
}

bool is_placeholder(int outer)
{
	char path[32], name[24];

	snprintf(path, sizeof(path), "/proc/%d/comm", outer);
	return read_name(AT_FDCWD, path, name, sizeof(name)) && is_placeholder_name(name);
}

static bool peek(int outer, uint64_t address, void *to, size_t size)
{
	struct iovec here = { to, size }, there = { (void *)(uintptr_t)address, size };

	return address && process_vm_readv(outer, &here, 1, &there, 1, 0) == (ssize_t)size;
}

/* Of a pidfd's process; 0: none of the jobs'. */
static int pid_of_pidfd(int outer, int fd)
{
	char path[64], text[1024];

	snprintf(path, sizeof(path), "%d/fdinfo/%d", inside(namespace_fd, outer), fd);
	if (!read_name(proc_fd, path, text, sizeof(text)))
		return 0;
	char *line = strstr(text, "\nPid:");
	int pid = line ? atoi(line + 5) : 0;
	return pid > 0 ? pid : 0;
}

bool forks(const struct seccomp_notif *n)
{
	uint64_t flags = 0;

	switch (n->data.nr) {
	case SYS_fork:
	case SYS_vfork:
	case SYS_clone: /* of no thread: the filter has seen to that */
		return true;
	case SYS_clone3:
		return peek((int)n->pid, n->data.args[0], &flags, sizeof(flags)) && !(flags & CLONE_THREAD);
	}
	return false;
}

bool read_signal(const struct seccomp_notif *n, struct question *q)
{
	const __u64 *a = n->data.args;
	uint64_t at = 0;
	siginfo_t info;

	switch (n->data.nr) {
	case SYS_kill:
		q->target = (int)a[0], q->signo = (int)a[1], q->code = SI_USER;
		return true;
	case SYS_tkill:
		q->target = (int)a[0], q->signo = (int)a[1], q->code = SI_TKILL;
		return q->target > 0;
	case SYS_tgkill: /* threads of processes elsewhere are not known here: their first one has the process's number */
		q->target = (int)a[1], q->signo = (int)a[2], q->code = SI_TKILL;
		return q->target > 0 && (int)a[0] == (int)a[1];
	case SYS_rt_sigqueueinfo:
		q->target = (int)a[0], q->signo = (int)a[1], at = a[2];
		break;
	case SYS_rt_tgsigqueueinfo:
		q->target = (int)a[1], q->signo = (int)a[2], at = a[3];
		if ((int)a[0] != (int)a[1])
			return false;
		break;
	case SYS_pidfd_send_signal:
		q->target = pid_of_pidfd((int)n->pid, (int)a[0]), q->signo = (int)a[1], at = a[2];
		q->code = SI_USER;
		if (!at || a[3])
			return q->target > 0 && !a[3];
		break;
	default:
		return false;
	}
	/* Only what a process may say of a signal to another: the rest is an error, which the kernel has to find. */
	if (q->target <= 0 || !peek((int)n->pid, at, &info, sizeof(info)) || info.si_code >= 0 || info.si_code == SI_TKILL)
		return false;
	q->code = SI_QUEUE;
	q->value = (uint64_t)(uintptr_t)info.si_value.sival_ptr;
	return true;
}
