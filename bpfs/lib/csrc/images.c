/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Images of processes, and what nodes keep of the master's files: libbproc(3).
 */
#define _GNU_SOURCE
#include "lib.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

/* A file for the way between a descriptor and the names that the cluster takes. */
static int spare_file(char *path)
{
	const char *folder = getenv("TMPDIR");

	snprintf(path, PATH_ROOM, "%s/bproc-image-XXXXXX", folder && *folder == '/' ? folder : "/tmp");
	return mkostemp(path, O_CLOEXEC);
}

static long copy(int from, int to)
{
	char data[1 << 16];
	long total = 0;
	ssize_t got;

	while ((got = read(from, data, sizeof data)) != 0) {
		if (got < 0) {
			if (errno == EINTR)
				continue;
			return -1;
		}
		for (ssize_t at = 0; at < got;) {
			ssize_t put = write(to, data + at, (size_t)(got - at));

			if (put < 0 && errno != EINTR)
				return -1;
			if (put > 0)
				at += put;
		}
		total += got;
	}
	return total;
}

/* When this very process was started, in clock ticks: the one that comes back from an image was started later. */
static unsigned long long started(void)
{
	char text[1024], *at;
	unsigned long long when = 0;

	if (bpfs_read("/proc/self/stat", text, sizeof text) < 0 || !(at = strrchr(text, ')')))
		return 0;
	for (int field = 2; field < 22 && at; field++)
		at = strchr(at + 1, ' ');
	if (at)
		when = strtoull(at, NULL, 10);
	return when;
}

EXPORT int bproc_dump(int fd, int flags)
{
	char spare[PATH_ROOM], path[PATH_ROOM];
	unsigned long long before = started();
	int file, why;
	long total = -1;

	if (flags) {
		errno = EINVAL;
		return -1;
	}
	if (no_cluster() < 0 || bpfs_path(path, "procs/%d/checkpoint", (int)getpid()) < 0)
		return -1;
	file = spare_file(spare);
	if (file < 0)
		return -1;
	close(file);
	unlink(spare); /* only its name is wanted, and only an image may stand there */
	if (bpfs_write(path, "%s\n", spare) < 0)
		return -1;
	if (started() != before)
		return 0;
	file = open(spare, O_RDONLY | O_CLOEXEC);
	if (file >= 0) {
		total = copy(file, fd);
		why = errno;
		close(file);
		unlink(spare);
		errno = why;
	}
	return (int)total;
}

/* The pid in the last line about this image in procs/restart, and the end of that line. */
static int restarted_as(const char *image, char *rest, size_t room)
{
	char path[PATH_ROOM], text[1 << 14], *at = text, *found = NULL;

	if (bpfs_path(path, "procs/restart") < 0 || bpfs_read(path, text, sizeof text) < 0)
		return -1;
	while ((at = strstr(at, image)))
		found = at++;
	found = found ? strstr(found, "pid=") : NULL;
	if (!found)
		return -1;
	at = strstr(found, " ok");
	snprintf(rest, room, "%s", at ? at + 3 : "");
	rest[strcspn(rest, "\n")] = 0;
	return atoi(found + 4);
}

static void end_as(int pid, const char *image)
{
	char path[PATH_ROOM], text[64];
	struct rlimit none = { 0, 0 };
	int value;

	/* It may have ended already: then the line about it says how. */
	if (bpfs_path(path, "procs/%d/wait", pid) < 0 || bpfs_read(path, text, sizeof text) < 0)
		for (int tries = 0; restarted_as(image, text, sizeof text) == pid && !*text; tries++) {
			if (tries == 100)
				_exit(127);
			nanosleep(&(struct timespec){ .tv_nsec = 10000000 }, NULL);
		}
	if (sscanf(text, " exit %d", &value) == 1)
		_exit(value);
	if (sscanf(text, " signal %d", &value) == 1) {
		setrlimit(RLIMIT_CORE, &none);
		signal(value, SIG_DFL);
		raise(value);
	}
	_exit(127);
}

EXPORT int bproc_undump(int fd)
{
	char spare[PATH_ROOM], path[PATH_ROOM];
	int file, pid, why;

	if (no_cluster() < 0 || bpfs_path(path, "procs/restart") < 0)
		return -1;
	file = spare_file(spare);
	if (file < 0)
		return -1;
	if (copy(fd, file) < 0 || bpfs_write(path, "%s %d anypid\n", spare, bproc_currnode()) < 0) {
		why = errno;
		close(file);
		unlink(spare);
		errno = why;
		return -1;
	}
	close(file);
	pid = restarted_as(spare, path, sizeof path);
	unlink(spare);
	if (pid <= 0) {
		errno = EIO;
		return -1;
	}
	end_as(pid, spare);
	return -1;
}

/* A process at its exec cannot be made an image of and go on here. */
EXPORT int bproc_execdump(int fd, int flags, const char *cmd, char *const argv[], char *const envp[])
{
	(void)fd, (void)flags, (void)cmd, (void)argv, (void)envp;
	errno = ENOSYS;
	return -1;
}

/* -- libraries: what nodes without files of their own keep ------------------------------------------------------- */

struct order {
	const char *verb, *name;
	int done, why;
};

static int tell(const struct bproc_node_info_t *info, void *of)
{
	struct order *order = of;
	char path[PATH_ROOM];

	if (strcmp(info->status, "up"))
		return 0;
	if (bpfs_path(path, "nodes/%d/cache", info->node) == 0 &&
	    bpfs_write(path, "%s%s%s\n", order->verb, *order->name ? " " : "", order->name) == 0)
		order->done++;
	else if (errno != EOPNOTSUPP) /* that node has files of its own, and needs nothing */
		order->why = errno;
	return 0;
}

static int tell_all(const char *verb, const char *name)
{
	struct order order = { .verb = verb, .name = name };

	if (each_node(tell, &order) < 0)
		return -1;
	if (!order.why)
		return 0;
	errno = order.why;
	return -1;
}

EXPORT int bproc_libadd(const char *name)
{
	if (!name || *name != '/') {
		errno = EINVAL;
		return -1;
	}
	return tell_all("prestage", name);
}

EXPORT int bproc_libclear(void)
{
	return tell_all("purge", "");
}

/* The cache knows contents, not names: what is not used any more goes by itself. */
EXPORT int bproc_libdel(const char *name)
{
	(void)name;
	errno = ENOSYS;
	return -1;
}

EXPORT int bproc_liblist(char **list)
{
	(void)list;
	errno = ENOSYS;
	return -1;
}
