/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Moving: libbproc(3). Every move is a write to nodes/N/migrate.
 */
#define _GNU_SOURCE
#include "lib.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define AT_ONCE 16 /* moves that are asked for at the same time */

static int migrate(int node, pid_t pid, const char *how)
{
	char path[PATH_ROOM];

	if (bpfs_path(path, "nodes/%d/migrate", node) < 0)
		return -1;
	if (bpfs_write(path, "%d%s\n", (int)pid, how) == 0)
		return 0;
	if (errno == ESRCH) {
		errno = BE_INVALIDPROC;
		return -1;
	}
	return node_error();
}

/* Without a cluster there is still the master, where everything is already. */
static int stays(int node)
{
	return node == bproc_currnode();
}

EXPORT int _bproc_move_io(int node, struct bproc_io_t *io, int iolen, int flags)
{
	int from = bproc_currnode();

	node = real_node(node);
	if (unknown_flags(flags) || check_io(io, iolen) < 0)
		return -1;
	if (!stays(node) && migrate(node, getpid(), "") < 0)
		return -1;
	return make_io(io, iolen, from);
}

EXPORT int _bproc_move(int node, int flags)
{
	return _bproc_move_io(node, NULL, 0, flags);
}

EXPORT int bproc_move(int node)
{
	return _bproc_move_io(node, NULL, 0, 0);
}

EXPORT int bproc_move_io(int node, struct bproc_io_t *io, int iolen)
{
	return _bproc_move_io(node, io, iolen, 0);
}

/* -- rfork: the parent moves the child, which waits to find itself elsewhere ------------------------------------- */

static void wait_for_move(int from, pid_t parent)
{
	while (bproc_currnode() == from) {
		if (getppid() != parent) /* the one that was to move us is dead */
			_exit(127);
		nanosleep(&(struct timespec){ .tv_nsec = 300000 }, NULL);
	}
}

/* In a child that has arrived. */
static void take_io(struct bproc_io_t *io, int iolen, int from)
{
	if (make_io(io, iolen, from) < 0)
		_exit(127);
}

struct moving {
	int n, next;
	const int *nodes;
	int *pids, *errors;
	pthread_mutex_t lock;
};

static void *move_some(void *of)
{
	struct moving *all = of;

	for (;;) {
		int i;

		pthread_mutex_lock(&all->lock);
		i = all->next++;
		pthread_mutex_unlock(&all->lock);
		if (i >= all->n)
			return NULL;
		all->errors[i] = 0;
		if (all->pids[i] > 0 && !stays(all->nodes[i]) && migrate(all->nodes[i], all->pids[i], "") < 0)
			all->errors[i] = errno;
	}
}

static void move_all(struct moving *all)
{
	pthread_t threads[AT_ONCE];
	int count = 0;

	pthread_mutex_init(&all->lock, NULL);
	while (count + 1 < all->n && count < AT_ONCE && pthread_create(&threads[count], NULL, move_some, all) == 0)
		count++;
	move_some(all);
	while (count)
		pthread_join(threads[--count], NULL);
	for (int i = 0; i < all->n; i++)
		if (all->pids[i] > 0 && all->errors[i]) {
			kill(all->pids[i], SIGKILL);
			waitpid(all->pids[i], NULL, 0);
			all->pids[i] = -all->errors[i];
		}
}

EXPORT int _bproc_vrfork_io(int n, int *nodes, int *pids, struct bproc_io_t *io, int iolen, int flags)
{
	int from = bproc_currnode(), *errors, *to;
	pid_t parent = getpid();
	struct moving all;

	if (n < 0 || (n && (!nodes || !pids))) {
		errno = EINVAL;
		return -1;
	}
	if (unknown_flags(flags) || check_io(io, iolen) < 0)
		return -1;
	errors = calloc((size_t)n + 1, sizeof *errors);
	to = calloc((size_t)n + 1, sizeof *to);
	if (!errors || !to) {
		free(errors);
		free(to);
		return -1;
	}
	for (int i = 0; i < n; i++) {
		to[i] = real_node(nodes[i]);
		pids[i] = fork();
		if (pids[i] == 0) {
			if (to[i] != from)
				wait_for_move(from, parent);
			take_io(io, iolen, from);
			free(errors);
			free(to);
			return i;
		}
		if (pids[i] < 0)
			pids[i] = -errno;
	}
	all = (struct moving){ .n = n, .nodes = to, .pids = pids, .errors = errors };
	move_all(&all);
	free(errors);
	free(to);
	return n;
}

EXPORT int _bproc_vrfork(int n, int *nodes, int *pids, int flags)
{
	return _bproc_vrfork_io(n, nodes, pids, NULL, 0, flags);
}

EXPORT int bproc_vrfork(int n, int *nodes, int *pids)
{
	return _bproc_vrfork_io(n, nodes, pids, NULL, 0, 0);
}

EXPORT int bproc_vrfork_io(int n, int *nodes, int *pids, struct bproc_io_t *io, int iolen)
{
	return _bproc_vrfork_io(n, nodes, pids, io, iolen, 0);
}

EXPORT int _bproc_rfork_io(int node, struct bproc_io_t *io, int iolen, int flags)
{
	int pid = 0, rank = _bproc_vrfork_io(1, &node, &pid, io, iolen, flags);

	if (rank < 1)
		return rank; /* 0: the child */
	if (pid < 0) {
		errno = -pid;
		return -1;
	}
	return pid;
}

EXPORT int _bproc_rfork(int node, int flags)
{
	return _bproc_rfork_io(node, NULL, 0, flags);
}

EXPORT int bproc_rfork(int node)
{
	return _bproc_rfork_io(node, NULL, 0, 0);
}

EXPORT int bproc_rfork_io(int node, struct bproc_io_t *io, int iolen)
{
	return _bproc_rfork_io(node, io, iolen, 0);
}

/* -- programs ---------------------------------------------------------------------------------------------------- */

/* A process of the master is smallest at its exec: armed, it moves there, and its program is looked up here. */
EXPORT int bproc_execmove(int node, const char *cmd, char *const argv[], char *const envp[])
{
	node = real_node(node);
	if (!stays(node)) {
		if (bproc_currnode() != BPROC_NODE_MASTER)
			return bproc_rexec(node, cmd, argv, envp);
		if (access(cmd, X_OK) < 0 || migrate(node, getpid(), " onexec") < 0)
			return -1;
	}
	execve(cmd, argv, envp);
	return -1;
}

EXPORT int bproc_execmove_io(int node, struct bproc_io_t *io, int iolen, const char *cmd, char *const argv[],
			     char *const envp[])
{
	if (!iolen)
		return bproc_execmove(node, cmd, argv, envp);
	if (access(cmd, X_OK) < 0)
		return -1;
	return bproc_rexec_io(node, io, iolen, cmd, argv, envp);
}

EXPORT int bproc_rexec_io(int node, struct bproc_io_t *io, int iolen, const char *cmd, char *const argv[],
			  char *const envp[])
{
	if (bproc_move_io(node, io, iolen) < 0)
		return -1;
	execve(cmd, argv, envp);
	return -1;
}

EXPORT int bproc_rexec(int node, const char *cmd, char *const argv[], char *const envp[])
{
	return bproc_rexec_io(node, NULL, 0, cmd, argv, envp);
}

EXPORT int bproc_execve(const char *cmd, char *const argv[], char *const envp[])
{
	return execve(cmd, argv, envp);
}
