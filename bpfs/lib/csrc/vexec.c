/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One program for many processes at once: libbproc(3). Children of ours wait; one more, the template, execs the program,
 * and what that has become is copied to all nodes (procs/onexec in bpfs(5)). Where the cluster does not take it so, each
 * child moves by itself.
 */
#define _GNU_SOURCE
#include "lib.h"

#include "../../cli/csrc/board.h"
#include "../../cli/csrc/nodespec.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST 1024        /* processes of one order: a busy master takes 20 s for them */
#define WAIT_SECONDS 100
#define PAIR_LENGTH 40   /* " PID:NODE:RANK" */
#define RANK "BPROC_RANK="

enum { WAIT, GO, GIVE_UP }; /* words of the board */

struct call {
	int n, *nodes, *pids;
	struct bproc_io_t *io;
	int iolen;
	const char *cmd;
	char *const *argv, *const *envp;
	int *board;    /* a word a child, and that of the template */
	int order;     /* procs/onexec, open for writing; -1: there is none, or it cannot be used */
	int failed[2]; /* a pipe an order: a struct failure of each child that could not move; it ends when all are on their way */
};

struct failure {
	int rank, why;
};

/* -- in the children ---------------------------------------------------------------------------------------------- */

/* The environment with the value of BPROC_RANK that the cluster puts there, too: where it has one, with room for it. */
static char *const *ranked(char *const envp[], int rank)
{
	static char text[sizeof RANK + 12];
	size_t count = 0;
	char **copy;

	snprintf(text, sizeof text, RANK "%d", rank);
	while (envp && envp[count])
		count++;
	copy = calloc(count + 1, sizeof *copy);
	if (!copy || !envp)
		return envp;
	for (size_t i = 0; i < count; i++)
		copy[i] = strncmp(envp[i], RANK, sizeof RANK - 1) || strlen(envp[i]) < strlen(text) ? envp[i] : text;
	return copy;
}

static void be_child(const struct call *call, int rank)
{
	struct failure failure = { .rank = rank, .why = ETIMEDOUT };
	int word;

	close(call->failed[0]);
	word = board_hear(&call->board[rank], WAIT_SECONDS);
	munmap(call->board, ((size_t)call->n + 1) * sizeof *call->board); /* shared memory keeps a process from moving */
	if (word == GO) {
		bproc_execmove_io(call->nodes[rank], call->io, call->iolen, call->cmd, call->argv,
				  ranked(call->envp, rank));
		failure.why = errno;
	}
	_exit(write(call->failed[1], &failure, sizeof failure) == sizeof failure ? 127 : 126);
}

static void be_template(const struct call *call)
{
	if (board_hear(&call->board[call->n], WAIT_SECONDS) == GO)
		execve(call->cmd, call->argv, call->envp);
	_exit(127);
}

/* -- in the caller ------------------------------------------------------------------------------------------------ */

/* By themselves they hear why they cannot move. */
static void let_go(const struct call *call, int first, int end)
{
	for (int i = first; i < end; i++)
		board_say(&call->board[i], GO);
}

/* Whether a write of this order was accepted, for some at least; the others have been let go. */
static int hand_in(const struct call *call, int first, int end, pid_t template)
{
	char *text = malloc(16 + (size_t)(end - first) * PAIR_LENGTH), *at = text, *state = NULL;
	char path[PATH_ROOM];
	int taken;

	if (!text)
		return 0;
	at += sprintf(at, "%d", (int)template);
	for (int i = first; i < end; i++)
		if (call->pids[i] > 0)
			at += sprintf(at, " %d:%d:%d", call->pids[i], real_node(call->nodes[i]), i);
	taken = write(call->order, text, (size_t)(at - text)) > 0;
	free(text);
	if (taken || errno != EREMOTEIO || bpfs_path(path, "procs/onexec") < 0)
		return taken;
	/* The file's last lines, `PID NODE OUTCOME ...`, tell which were refused. */
	text = read_whole(path);
	for (char *line = text ? strtok_r(text, "\n", &state) : NULL; line; line = strtok_r(NULL, "\n", &state)) {
		int pid, node;
		char outcome[16];

		if (sscanf(line, "%d %d %15s", &pid, &node, outcome) != 3 || !strcmp(outcome, "ok"))
			continue;
		for (int i = first; i < end; i++)
			if (call->pids[i] == pid)
				let_go(call, i, i + 1);
	}
	taken = text != NULL;
	free(text);
	return taken;
}

/* Has these become the program, with one order; all are on their way when it returns. */
static void order(struct call *call, int first, int end)
{
	pid_t template = -1;
	int taken = 0, status = -1;

	call->board[call->n] = WAIT;
	if (call->order >= 0)
		template = fork();
	if (template == 0)
		be_template(call);
	if (template > 0) {
		taken = hand_in(call, first, end, template);
		board_say(&call->board[call->n], taken ? GO : GIVE_UP);
		while (waitpid(template, &status, 0) < 0)
			if (errno != EINTR) {
				status = 0; /* the caller ignores SIGCHLD: nobody knows */
				break;
			}
	}
	/* A template that was of use exits with 0. */
	if (!taken || status)
		let_go(call, first, end);
}

static void hear_failures(const struct call *call)
{
	struct failure failure;
	ssize_t got;

	while ((got = read(call->failed[0], &failure, sizeof failure)) == sizeof failure || (got < 0 && errno == EINTR)) {
		if (got < 0)
			continue;
		waitpid(call->pids[failure.rank], NULL, 0);
		call->pids[failure.rank] = -failure.why;
	}
}

static void start(struct call *call, int first, int end)
{
	if (pipe2(call->failed, O_CLOEXEC) < 0) {
		for (int i = first; i < end; i++)
			call->pids[i] = -errno;
		return;
	}
	for (int i = first; i < end; i++) {
		call->pids[i] = fork();
		if (call->pids[i] == 0)
			be_child(call, i);
		if (call->pids[i] < 0)
			call->pids[i] = -errno;
	}
	order(call, first, end);
	close(call->failed[1]);
	hear_failures(call);
	close(call->failed[0]);
}

EXPORT int bproc_vexecmove_io(int n, int *nodes, int *pids, struct bproc_io_t *io, int iolen, const char *cmd,
			      char *const argv[], char *const envp[])
{
	struct call call = { n, nodes, pids, io, iolen, cmd, argv, envp, NULL, -1, { -1, -1 } };
	char path[PATH_ROOM];

	if (n < 0 || (n && (!nodes || !pids)) || !cmd) {
		errno = EINVAL;
		return -1;
	}
	if (check_io(io, iolen) < 0)
		return -1;
	call.board = board_make((size_t)n + 1);
	if (!call.board)
		return -1;
	/* The program is that of the master; with io entries each has descriptors of its own to make. */
	if (n > 1 && !iolen && bproc_currnode() == BPROC_NODE_MASTER && access(cmd, X_OK) == 0 &&
	    bpfs_path(path, "procs/onexec") == 0)
		call.order = open(path, O_WRONLY | O_CLOEXEC);
	for (int first = 0; first < n; first += MOST)
		start(&call, first, n - first < MOST ? n : first + MOST);
	if (call.order >= 0)
		close(call.order);
	munmap(call.board, ((size_t)n + 1) * sizeof *call.board);
	return n;
}

EXPORT int bproc_vexecmove(int n, int *nodes, int *pids, const char *cmd, char *const argv[], char *const envp[])
{
	return bproc_vexecmove_io(n, nodes, pids, NULL, 0, cmd, argv, envp);
}
