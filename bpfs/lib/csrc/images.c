/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Images of processes, and what nodes keep of the master's files: libbproc(3).
 */
#define _GNU_SOURCE
#include "lib.h"
#include "../../cli/csrc/nodespec.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
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

/* Only the name of such a file: nothing but an image may stand there when one is to be written. */
static int spare_name(char *path)
{
	int file = spare_file(path);

	if (file < 0)
		return -1;
	close(file);
	return unlink(path);
}

/* Has the image of a process written into a file. A node's fork is known everywhere within milliseconds. */
static int save(pid_t pid, const char *image)
{
	char path[PATH_ROOM];
	int done;

	if (bpfs_path(path, "procs/%d/checkpoint", (int)pid) < 0)
		return -1;
	for (int tries = 0; (done = bpfs_write(path, "%s\n", image)) < 0 && errno == ENOENT && tries < 100; tries++)
		nanosleep(&(struct timespec){ .tv_nsec = 10000000 }, NULL);
	return done;
}

/* Copies an image to a descriptor, and removes it. Returns its size, or -1. */
static int take(const char *image, int fd)
{
	int file = open(image, O_RDONLY | O_CLOEXEC), why;
	long total;

	if (file < 0)
		return -1;
	total = copy(file, fd);
	why = errno;
	close(file);
	unlink(image);
	errno = why;
	return (int)total;
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
	char spare[PATH_ROOM];
	unsigned long long before = started();

	if (unknown_flags(flags) || no_cluster() < 0 || spare_name(spare) < 0 || save(getpid(), spare) < 0)
		return -1;
	return started() != before ? 0 : take(spare, fd);
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

/* What bproc_execdump has saved is stopped, and comes back so. */
static void let_run(int pid)
{
	char path[PATH_ROOM], stat[1024], *letter;

	if (bpfs_path(path, "procs/%d/stat", pid) == 0 && bpfs_read(path, stat, sizeof stat) > 0 &&
	    (letter = strrchr(stat, ')')) && letter[1] == ' ' && letter[2] == 'T' &&
	    bpfs_path(path, "procs/%d/signal", pid) == 0)
		bpfs_write(path, "CONT\n");
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
	let_run(pid);
	end_as(pid, spare);
	return -1;
}

/* The child that becomes the program: it stops at its exec, before its first instruction. */
static void become(int fd, int failed, const char *cmd, char *const argv[], char *const envp[])
{
	sigset_t trap;
	int why;

	sigemptyset(&trap);
	sigaddset(&trap, SIGTRAP); /* what stops it must not be blocked */
	sigprocmask(SIG_UNBLOCK, &trap, NULL);
	fcntl(fd, F_SETFD, FD_CLOEXEC);
	if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0)
		execve(cmd, argv, envp);
	why = errno;
	if (write(failed, &why, sizeof why) < 0)
		_exit(126);
	_exit(127);
}

/* Waits for that stop, and has it last without a tracer. Returns 0, or -1 with the errno of the exec. */
static int stop_at_exec(pid_t child, int failed)
{
	int status, why;

	if (read(failed, &why, sizeof why) == sizeof why) {
		waitpid(child, NULL, 0);
		errno = why;
		return -1;
	}
	if (waitpid(child, &status, WUNTRACED) != child || !WIFSTOPPED(status) ||
	    ptrace(PTRACE_DETACH, child, NULL, (void *)SIGSTOP) < 0 || waitpid(child, &status, WUNTRACED) != child ||
	    !WIFSTOPPED(status)) {
		errno = ECHILD; /* somebody else took it, or killed it */
		return -1;
	}
	return 0;
}

EXPORT int bproc_execdump(int fd, int flags, const char *cmd, char *const argv[], char *const envp[])
{
	char spare[PATH_ROOM];
	int ends[2], result, why;
	pid_t child;

	if (unknown_flags(flags) || fcntl(fd, F_GETFD) < 0 || no_cluster() < 0 || spare_name(spare) < 0 ||
	    pipe2(ends, O_CLOEXEC) < 0)
		return -1;
	child = fork();
	if (child == 0)
		become(fd, ends[1], cmd, argv, envp);
	why = errno;
	close(ends[1]);
	errno = why;
	result = child < 0 ? -1 : stop_at_exec(child, ends[0]);
	if (result == 0)
		result = save(child, spare);
	why = errno;
	close(ends[0]);
	if (child > 0) {
		kill(child, SIGKILL);
		waitpid(child, NULL, 0);
	}
	errno = why;
	if (result < 0 || take(spare, fd) < 0)
		return -1;
	_exit(0);
}

/* -- libraries: what nodes without files of their own have before they need it ----------------------------------- */

static int tell(const char *verb, const char *name)
{
	char path[PATH_ROOM];

	if (no_cluster() < 0 || bpfs_path(path, "libraries") < 0)
		return -1;
	return bpfs_write(path, "%s %s\n", verb, name);
}

EXPORT int bproc_libadd(const char *name)
{
	return tell("add", name);
}

EXPORT int bproc_libdel(const char *name)
{
	return tell("delete", name);
}

EXPORT int bproc_libclear(void)
{
	return tell("clear", "");
}

EXPORT int bproc_liblist(char **list)
{
	char path[PATH_ROOM], *text, *more;
	size_t length;

	if (no_cluster() < 0 || bpfs_path(path, "libraries") < 0 || !(text = read_whole(path)))
		return -1;
	length = strlen(text);
	more = realloc(text, length + 2);
	if (!more) {
		free(text);
		return -1;
	}
	for (size_t i = 0; i < length; i++)
		if (more[i] == '\n')
			more[i] = 0;
	more[length] = more[length + 1] = 0; /* an empty name ends the list */
	*list = more;
	return 0;
}
