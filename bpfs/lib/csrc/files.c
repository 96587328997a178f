/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Files below the mount, as lib.h says: of all the libraries here.
 */
#define _GNU_SOURCE
#include "lib.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <unistd.h>

const char *bpfs_mount(void)
{
	const char *mount = getenv("BPFS");

	return mount && *mount ? mount : "/bpfs";
}

int bpfs_path(char *path, const char *format, ...)
{
	va_list arguments;
	int begun = snprintf(path, PATH_ROOM, "%s/", bpfs_mount()), more;

	if (begun < 0 || begun >= PATH_ROOM) {
		errno = ENAMETOOLONG;
		return -1;
	}
	va_start(arguments, format);
	more = vsnprintf(path + begun, PATH_ROOM - (size_t)begun, format, arguments);
	va_end(arguments);
	if (more < 0 || begun + more >= PATH_ROOM) {
		errno = ENAMETOOLONG;
		return -1;
	}
	return 0;
}

int bpfs_read(const char *path, char *text, size_t room)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC), why;
	size_t length = 0;
	ssize_t got;

	if (fd < 0)
		return -1;
	while (length + 1 < room) {
		got = read(fd, text + length, room - length - 1);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0) {
			why = errno;
			close(fd);
			errno = why;
			return -1;
		}
		if (!got)
			break;
		length += (size_t)got;
	}
	close(fd);
	while (length && text[length - 1] == '\n')
		length--;
	text[length] = 0;
	return (int)length;
}

int bpfs_write(const char *path, const char *format, ...)
{
	char text[4096];
	va_list arguments;
	int length, fd, why;
	ssize_t done;

	va_start(arguments, format);
	length = vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	if (length < 0 || (size_t)length >= sizeof text) {
		errno = E2BIG;
		return -1;
	}
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	done = write(fd, text, (size_t)length);
	why = errno;
	close(fd);
	errno = why;
	return done < 0 ? -1 : 0;
}

int no_cluster(void)
{
	char path[PATH_ROOM];

	if (bpfs_path(path, "status") == 0 && access(path, R_OK) == 0)
		return 0;
	errno = ENOSYS;
	return -1;
}

int node_error(void)
{
	switch (errno) {
	case ENOENT:
		if (no_cluster() == 0)
			errno = BE_INVALIDNODE;
		break;
	case EHOSTDOWN:
		errno = BE_NODEDOWN;
		break;
	}
	return -1;
}
