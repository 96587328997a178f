/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What is known of nodes: libbproc(3).
 */
#define _GNU_SOURCE
#include "lib.h"
#include "../../cli/csrc/nodespec.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <netinet/in.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

static unsigned int id_of(const char *name, int group)
{
	char *end;
	unsigned long number = strtoul(name, &end, 10);
	struct passwd *user;
	struct group *of;

	if (*name && !*end)
		return (unsigned int)number;
	if (group)
		return (of = getgrnam(name)) ? of->gr_gid : (unsigned int)-1;
	return (user = getpwnam(name)) ? user->pw_uid : (unsigned int)-1;
}

/* Only an IPv4 address fits into struct sockaddr; bproc_nodeaddr knows the others, too. */
static void set_address(struct sockaddr *address, const char *text)
{
	struct sockaddr_in found = { .sin_family = AF_INET };

	memset(address, 0, sizeof *address);
	if (inet_pton(AF_INET, text, &found.sin_addr) == 1)
		memcpy(address, &found, sizeof found);
}

static int parse_line(char *line, struct bproc_node_info_t *info)
{
	char *words[6], *rest = line;

	for (int i = 0; i < 6; i++)
		if (!(words[i] = strtok_r(i ? NULL : line, " ", &rest)))
			return -1;
	memset(info, 0, sizeof *info);
	info->node = atoi(words[0]);
	snprintf(info->status, sizeof info->status, "%s", words[1]);
	info->mode = (unsigned int)strtoul(words[2], NULL, 8);
	info->user = id_of(words[3], 0);
	info->group = id_of(words[4], 1);
	set_address(&info->addr, words[5]);
	info->atime = info->mtime = time(NULL);
	return 0;
}

int each_node(int (*take)(const struct bproc_node_info_t *info, void *of), void *of)
{
	char path[PATH_ROOM], *text, *line, *rest;
	struct bproc_node_info_t info;
	int result = 0;

	if (bpfs_path(path, "status") < 0)
		return -1;
	text = read_whole(path);
	if (!text)
		return no_cluster();
	for (line = strtok_r(text, "\n", &rest); line && !result; line = strtok_r(NULL, "\n", &rest))
		if (parse_line(line, &info) == 0)
			result = take(&info, of);
	free(text);
	return result;
}

static int count_one(const struct bproc_node_info_t *info, void *of)
{
	(void)info;
	++*(int *)of;
	return 0;
}

EXPORT int bproc_numnodes(void)
{
	int count = 0;

	return each_node(count_one, &count) < 0 ? -1 : count;
}

EXPORT int bproc_currnode(void)
{
	char path[PATH_ROOM], target[64];
	ssize_t length;
	int node;

	if (bpfs_path(path, "self") < 0)
		return BPROC_NODE_MASTER;
	length = readlink(path, target, sizeof target - 1);
	if (length < 0)
		return BPROC_NODE_MASTER; /* no cluster: whoever asks is at home */
	target[length] = 0;
	return sscanf(target, "nodes/%d", &node) == 1 ? node : BPROC_NODE_MASTER;
}

static int find_one(const struct bproc_node_info_t *info, void *of)
{
	struct bproc_node_info_t *wanted = of;

	if (info->node != wanted->node)
		return 0;
	*wanted = *info;
	return 1;
}

static int read_number(int node, const char *name, int group, unsigned int *number)
{
	char path[PATH_ROOM], text[256];

	if (bpfs_path(path, "nodes/%d/%s", node, name) < 0 || bpfs_read(path, text, sizeof text) < 0)
		return node_error();
	*number = group < 0 ? (unsigned int)strtoul(text, NULL, 8) : id_of(text, group);
	return 0;
}

/* The master is not in the status file. */
static int master_info(struct bproc_node_info_t *info)
{
	char path[PATH_ROOM], text[256];

	memset(info, 0, sizeof *info);
	info->node = BPROC_NODE_MASTER;
	if (bpfs_path(path, "nodes/-1/state") < 0 || bpfs_read(path, info->status, sizeof info->status) < 0)
		return node_error();
	if (read_number(-1, "mode", -1, &info->mode) < 0 || read_number(-1, "owner", 0, &info->user) < 0 ||
	    read_number(-1, "group", 1, &info->group) < 0)
		return -1;
	if (bpfs_path(path, "nodes/-1/address") == 0 && bpfs_read(path, text, sizeof text) > 0)
		set_address(&info->addr, text);
	info->atime = info->mtime = time(NULL);
	return 0;
}

EXPORT int bproc_nodeinfo(int node, struct bproc_node_info_t *info)
{
	int result;

	node = real_node(node);
	if (node == BPROC_NODE_MASTER)
		return master_info(info);
	info->node = node;
	result = each_node(find_one, info);
	if (result == 0)
		errno = BE_INVALIDNODE;
	return result == 1 ? 0 : -1;
}

EXPORT int bproc_nodestatus(int node, char *status, int len)
{
	char path[PATH_ROOM], text[64];
	int length;

	if (bpfs_path(path, "nodes/%d/state", real_node(node)) < 0)
		return -1;
	length = bpfs_read(path, text, sizeof text);
	if (length < 0)
		return node_error();
	if (len > 0)
		snprintf(status, (size_t)len, "%s", text);
	return length;
}

EXPORT int bproc_nodeaddr(int node, struct sockaddr *addr, int *size)
{
	char path[PATH_ROOM], text[128];
	struct sockaddr_in four = { .sin_family = AF_INET };
	struct sockaddr_in6 six = { .sin6_family = AF_INET6 };
	const void *found = &four;
	size_t length = sizeof four;

	if (bpfs_path(path, "nodes/%d/address", real_node(node)) < 0)
		return -1;
	if (bpfs_read(path, text, sizeof text) < 0)
		return node_error();
	if (inet_pton(AF_INET, text, &four.sin_addr) != 1) {
		if (inet_pton(AF_INET6, text, &six.sin6_addr) != 1) {
			errno = BE_NODEDOWN; /* it has never been seen */
			return -1;
		}
		found = &six, length = sizeof six;
	}
	if (*size < 0 || (size_t)*size < length) {
		errno = EINVAL;
		return -1;
	}
	memcpy(addr, found, length);
	*size = (int)length;
	return 0;
}

static int add_one(const struct bproc_node_info_t *info, void *of)
{
	return bproc_nodeset_add(of, (struct bproc_node_info_t *)info);
}

EXPORT int bproc_nodelist(struct bproc_node_set_t *set)
{
	set->size = 0;
	return each_node(add_one, set) < 0 ? -1 : set->size;
}

EXPORT int bproc_nodelist_(struct bproc_node_set_t *set, int fd)
{
	char events[512];
	struct pollfd ready = { .fd = fd, .events = POLLIN };

	/* What has happened so far is in the list: the notifier is quiet until something more does. */
	while (fd >= 0 && poll(&ready, 1, 0) == 1 && ready.revents & POLLIN && read(fd, events, sizeof events) > 0)
		;
	return bproc_nodelist(set);
}

/* The process that watches for a notifier. A read that waits in /bpfs cannot be polled, so this one waits there and
 * writes a byte for each event into a pipe, which can; SIGIO comes when the pipe's reader has gone. */
static int watched = -1;

static void reader_gone(int signo)
{
	struct pollfd end = { .fd = watched };

	(void)signo;
	if (poll(&end, 1, 0) == 1 && end.revents & (POLLERR | POLLHUP | POLLNVAL))
		_exit(0);
}

static void watch(int events, int pipe_end)
{
	struct sigaction action = { .sa_handler = reader_gone };
	char text[4096];
	sigset_t none;
	ssize_t got;

	watched = pipe_end;
	signal(SIGPIPE, SIG_DFL);
	sigaction(SIGIO, &action, NULL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	fcntl(pipe_end, F_SETOWN, getpid());
	fcntl(pipe_end, F_SETFL, O_ASYNC | O_NONBLOCK);
	reader_gone(0);
	while ((got = read(events, text, sizeof text)) > 0 || (got < 0 && errno == EINTR))
		if (got > 0 && write(pipe_end, "!", 1) < 0 && errno != EAGAIN)
			break;
	_exit(0);
}

EXPORT int bproc_notifier(void)
{
	char path[PATH_ROOM];
	int ends[2], events;
	pid_t child;

	if (no_cluster() < 0 || bpfs_path(path, "events") < 0)
		return -1;
	events = open(path, O_RDONLY | O_CLOEXEC); /* here: what happens from now on counts */
	if (events < 0)
		return -1;
	if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0) {
		close(events);
		return -1;
	}
	child = fork();
	if (child == 0) {
		/* Nobody's child, so that the caller's wait(2) knows nothing of it. */
		if (fork() == 0) {
			for (int fd = 0; fd < 1024; fd++)
				if (fd != events && fd != ends[1])
					close(fd);
			watch(events, ends[1]);
		}
		_exit(0);
	}
	close(events);
	close(ends[1]);
	if (child < 0) {
		close(ends[0]);
		return -1;
	}
	waitpid(child, NULL, __WALL);
	return ends[0];
}

static int attribute(char *path, char *full, size_t room, int node, const char *name)
{
	if (!name || !*name || strlen(name) > BPROC_XATTR_MAX_NAME_SIZE) {
		errno = EINVAL;
		return -1;
	}
	snprintf(full, room, strncmp(name, "bproc.", 6) ? "bproc.%s" : "%s", name);
	return bpfs_path(path, "nodes/%d", real_node(node));
}

EXPORT int bproc_getnodeattr(int node, char *name, void *value, int size)
{
	char path[PATH_ROOM], full[BPROC_XATTR_MAX_NAME_SIZE + 8];
	ssize_t got;

	if (attribute(path, full, sizeof full, node, name) < 0)
		return -1;
	got = getxattr(path, full, value, size < 0 ? 0 : (size_t)size);
	return got < 0 ? node_error() : (int)got;
}

EXPORT int bproc_setnodeattr(int node, char *name, void *value, int size)
{
	char path[PATH_ROOM], full[BPROC_XATTR_MAX_NAME_SIZE + 8];

	if (size < 0 || size > BPROC_XATTR_MAX_VALUE_SIZE) {
		errno = EINVAL;
		return -1;
	}
	if (attribute(path, full, sizeof full, node, name) < 0)
		return -1;
	return setxattr(path, full, value, (size_t)size, 0) < 0 ? node_error() : 0;
}
