/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What a moved process finds at its descriptors: struct bproc_io_t, see libbproc(3).
 */
#define _GNU_SOURCE
#include "lib.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int check_io(const struct bproc_io_t *io, int iolen)
{
	if (iolen < 0 || iolen > BPROC_IO_MAX || (iolen && !io))
		goto wrong;
	for (int i = 0; i < iolen; i++) {
		if (io[i].fd < 0 || io[i].type < BPROC_IO_FILE || io[i].type > BPROC_IO_MEMFILE ||
		    io[i].flags & ~(BPROC_IO_SEND_INFO | BPROC_IO_DELAY))
			goto wrong;
		if (io[i].type == BPROC_IO_FILE && !memchr(io[i].d.file.name, 0, sizeof io[i].d.file.name))
			goto wrong;
		if (io[i].type == BPROC_IO_MEMFILE && (io[i].d.mem.size < 0 || (io[i].d.mem.size && !io[i].d.mem.base)))
			goto wrong;
	}
	return 0;
wrong:
	errno = EINVAL;
	return -1;
}

static int write_all(int fd, const char *data, size_t size)
{
	while (size) {
		ssize_t done = write(fd, data, size);

		if (done < 0 && errno != EINTR)
			return -1;
		if (done > 0)
			data += done, size -= (size_t)done;
	}
	return 0;
}

static int open_file(const struct bproc_io_t *io)
{
	int fd = open(io->d.file.name, io->d.file.flags, (mode_t)io->d.file.mode);

	if (fd >= 0 && io->d.file.offset && lseek(fd, io->d.file.offset, SEEK_SET) < 0) {
		int why = errno;
		close(fd);
		errno = why;
		return -1;
	}
	return fd;
}

static int open_socket(const struct bproc_io_t *io, int from)
{
	struct sockaddr_in address;
	int length = sizeof address, fd;
	int info[2] = { getpid(), io->fd };

	memcpy(&address, &io->d.addr, sizeof address);
	if (address.sin_family != AF_INET) {
		errno = EAFNOSUPPORT;
		return -1;
	}
	if (address.sin_addr.s_addr == 0) {
		in_port_t port = address.sin_port;

		if (bproc_nodeaddr(from, (struct sockaddr *)&address, &length) < 0)
			return -1;
		address.sin_port = port;
	}
	fd = socket(AF_INET, SOCK_STREAM, 0);
	if (fd < 0)
		return -1;
	if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0 ||
	    (io->flags & BPROC_IO_SEND_INFO && write_all(fd, (char *)info, sizeof info) < 0)) {
		int why = errno;
		close(fd);
		errno = why;
		return -1;
	}
	return fd;
}

static int open_memory(const struct bproc_io_t *io)
{
	int fd = memfd_create("bproc", 0);

	if (fd >= 0 && (write_all(fd, io->d.mem.base, (size_t)io->d.mem.size) < 0 || lseek(fd, 0, SEEK_SET) < 0)) {
		int why = errno;
		close(fd);
		errno = why;
		return -1;
	}
	return fd;
}

int make_io(struct bproc_io_t *io, int iolen, int from)
{
	for (int i = 0; i < iolen; i++) {
		int fd = io[i].type == BPROC_IO_FILE     ? open_file(&io[i])
			 : io[i].type == BPROC_IO_SOCKET ? open_socket(&io[i], from)
							 : open_memory(&io[i]);

		if (fd < 0)
			return -1;
		if (fd == io[i].fd)
			continue;
		if (dup2(fd, io[i].fd) < 0) {
			int why = errno;
			close(fd);
			errno = why;
			return -1;
		}
		close(fd);
	}
	return 0;
}
