/* Numbers of processes in a pid namespace inside of ours.
 * SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef INSIDE_H
#define INSIDE_H

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define PID_IN_PIDNS 0x8004b708u /* linux/nsfs.h, since 6.11 */
#define TGID_IN_PIDNS 0x8004b709u

/* By a line of /proc/PID/status, NSpid or NStgid; 0 when it is gone. */
static inline int inside_by_status(int outer, const char *key)
{
	char path[48], text[4096];
	int pid = 0;

	snprintf(path, sizeof(path), "/proc/%d/status", outer);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (fd >= 0)
		close(fd);
	if (n <= 0)
		return 0;
	text[n] = 0;
	char *line = strstr(text, key);
	if (!line)
		return 0;
	*strchrnul(line + 1, '\n') = 0;
	char *last = strrchr(line, '\t');
	if (last)
		pid = atoi(last + 1);
	return pid;
}

/* The process's number there; 0 when it is gone. */
static inline int inside(int namespace, int outer)
{
	int pid = ioctl(namespace, PID_IN_PIDNS, outer);

	if (pid >= 0)
		return pid;
	return errno == ESRCH ? 0 : inside_by_status(outer, "\nNSpid:");
}

/* That of the process that a thread belongs to. */
static inline int inside_group(int namespace, int outer)
{
	int pid = ioctl(namespace, TGID_IN_PIDNS, outer);

	if (pid >= 0)
		return pid;
	return errno == ESRCH ? 0 : inside_by_status(outer, "\nNStgid:");
}

#endif
