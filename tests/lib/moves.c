/* Checks rfork, vrfork, move, execmove and lists of processes; three nodes, all up. */
#include "check.h"

#include <signal.h>

static int ended(int pid)
{
	int status;

	CHECK(waitpid(pid, &status, 0) == pid);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static void ring(void)
{
	int first = getpid();

	for (int node = 0; node < 3; node++)
		CHECK(bproc_move(node) == 0 && bproc_currnode() == node && getpid() == first);
	CHECK(bproc_move(2) == 0 && bproc_move(BPROC_NODE_SELF) == 0);
	CHECK(bproc_move(BPROC_NODE_MASTER) == 0 && bproc_currnode() == BPROC_NODE_MASTER);
	CHECK(bproc_move(17) == -1 && errno == BE_INVALIDNODE);
	CHECK(_bproc_move(0, 13) == -1 && errno == EINVAL);
}

static void forks(void)
{
	int pid = bproc_rfork(1);

	CHECK(pid >= 0);
	if (pid == 0) {
		CHECK(bproc_currnode() == 1);
		exit(bproc_currnode() == 1 ? 11 : 1);
	}
	CHECK(ended(pid) == 11);
	CHECK(bproc_rfork(12) == -1 && errno == BE_INVALIDNODE);
	CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD);
	pid = bproc_rfork(BPROC_NODE_MASTER);
	CHECK(pid >= 0);
	if (pid == 0)
		exit(3);
	CHECK(ended(pid) == 3);
}

static void many(void)
{
	int nodes[4] = { 0, 1, 2, 9 }, pids[4], rank = bproc_vrfork(4, nodes, pids), count;
	struct bproc_proc_info_t *list;

	CHECK(rank >= 0);
	if (rank < 4) {
		CHECK(bproc_currnode() == nodes[rank]);
		pause();
		exit(1);
	}
	CHECK(pids[3] == -BE_INVALIDNODE);
	for (int i = 0; i < 3; i++) {
		CHECK(pids[i] > 0 && bproc_pidnode(pids[i]) == i);
		count = bproc_proclist(i, &list);
		CHECK(count == 1 && list[0].pid == pids[i] && list[0].node == i);
		free(list);
		CHECK(kill(pids[i], SIGTERM) == 0 && ended(pids[i]) == -SIGTERM);
	}
	CHECK(bproc_proclist(0, &list) == 0);
	free(list);
	CHECK(bproc_proclist(44, &list) == -1 && errno == BE_INVALIDNODE);
	CHECK(bproc_pidnode(getpid()) == BPROC_NODE_MASTER && errno == 0);
	CHECK(bproc_pidnode(3999999) == -1 && errno == BE_INVALIDPROC);
	CHECK(bproc_vrfork(-1, nodes, pids) == -1 && errno == EINVAL);
}

/* More than nodes, one of them at home and one nowhere: each has its rank, which one tells with its end. */
static void in_one_order(void)
{
	char *shell[] = { "sh", "-c", "exit $((50 + $BPROC_RANK))", NULL }, *environment[] = { "BPROC_RANK=XXXX", NULL };
	int nodes[24], pids[24];

	for (int i = 0; i < 24; i++)
		nodes[i] = i == 7 ? 8 : i % 4 - 1;
	CHECK(bproc_vexecmove(24, nodes, pids, "/bin/sh", shell, environment) == 24);
	for (int i = 0; i < 24; i++)
		CHECK(i == 7 ? pids[i] == -BE_INVALIDNODE : bproc_pidnode(pids[i]) <= nodes[i] && ended(pids[i]) == 50 + i);
	CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD);
}

static void programs(void)
{
	char *hostname[] = { "hostname", NULL }, *shell[] = { "sh", "-c", "exit $((40 + $X))", NULL };
	char *environment[] = { "X=2", "PATH=/usr/bin:/bin", NULL };
	int nodes[3] = { 2, 0, 8 }, pids[3];

	fflush(stdout);
	if (fork() == 0) {
		bproc_execmove(1, "/bin/hostname", hostname, environment);
		exit(99);
	}
	CHECK(wait(NULL) > 0);
	if (fork() == 0) {
		bproc_rexec(2, "/bin/hostname", hostname, environment);
		exit(99);
	}
	CHECK(wait(NULL) > 0);
	CHECK(bproc_execmove(1, "/no/such/program", hostname, environment) == -1 && errno == ENOENT);
	CHECK(bproc_execmove(6, "/bin/hostname", hostname, environment) == -1 && errno == BE_INVALIDNODE);
	CHECK(bproc_vexecmove(3, nodes, pids, "/bin/sh", shell, environment) == 3);
	CHECK(ended(pids[0]) == 42 && ended(pids[1]) == 42 && pids[2] == -BE_INVALIDNODE);
	in_one_order();
	if (fork() == 0) {
		bproc_execve("/bin/hostname", hostname, environment);
		exit(99);
	}
	CHECK(wait(NULL) > 0);
}

int main(void)
{
	ring();
	forks();
	many();
	programs();
	return 0;
}
