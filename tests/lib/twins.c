/* Checks the twins of calls that move, with io and flags; three nodes, all up: twins FOLDER. */
#include "check.h"

#include <fcntl.h>
#include <signal.h>

#define OUT 7

static struct bproc_io_t io = { .fd = OUT, .type = BPROC_IO_FILE };

static void tell(const char *what)
{
	char text[64];
	int length = snprintf(text, sizeof text, "%s %d\n", what, bproc_currnode());

	if (write(OUT, text, (size_t)length) != length)
		_exit(98);
}

static void well_ended(int pid)
{
	int status;

	CHECK(pid > 0 && waitpid(pid, &status, 0) == pid && status == 0);
}

static void one(void)
{
	int pid = fork();

	if (pid == 0) {
		CHECK(_bproc_move_io(1, &io, 1, BPROC_DUMP_ALL) == 0);
		tell("move_io");
		_exit(0);
	}
	well_ended(pid);
	if ((pid = _bproc_rfork(2, BPROC_DUMP_OTHER)) == 0)
		_exit(bproc_currnode() == 2 ? 0 : 1);
	well_ended(pid);
	if ((pid = _bproc_rfork_io(0, &io, 1, 0)) == 0) {
		tell("rfork_io");
		_exit(0);
	}
	well_ended(pid);
	if ((pid = bproc_rfork_io(BPROC_NODE_MASTER, &io, 1)) == 0) {
		tell("rfork_io");
		_exit(0);
	}
	well_ended(pid);
	CHECK(_bproc_rfork(1, 16) == -1 && errno == EINVAL);
}

static void several(void)
{
	int nodes[] = { 2, 1 }, pids[2], rank;

	for (int round = 0; round < 3; round++) {
		rank = round == 0 ? _bproc_vrfork(2, nodes, pids, 0) :
		       round == 1 ? _bproc_vrfork_io(2, nodes, pids, &io, 1, BPROC_DUMP_EXEC) :
				    bproc_vrfork_io(2, nodes, pids, &io, 1);
		CHECK(rank >= 0);
		if (rank < 2) {
			if (round)
				tell("vrfork_io");
			_exit(bproc_currnode() == nodes[rank] ? 0 : 1);
		}
		well_ended(pids[0]);
		well_ended(pids[1]);
	}
}

static void programs(void)
{
	char *shell[] = { "sh", "-c", "echo $WORD $(uname -n) >&7", NULL };
	char *first[] = { "WORD=rexec_io", "PATH=/usr/bin:/bin", NULL }, *second[] = { "WORD=vexecmove_io", first[1], NULL };
	int nodes[] = { 0, 2 }, pids[2], pid = fork();

	if (pid == 0) {
		bproc_rexec_io(1, &io, 1, "/bin/sh", shell, first);
		_exit(99);
	}
	well_ended(pid);
	CHECK(bproc_vexecmove_io(2, nodes, pids, &io, 1, "/bin/sh", shell, second) == 2);
	well_ended(pids[0]);
	well_ended(pids[1]);
}

/* Lists of a node whose processes come and go have each of them once, and always the one that stays. */
static void comings_and_goings(void)
{
	struct bproc_proc_info_t *list;
	int stays = bproc_rfork(1), comes, count, seen;

	if (stays == 0) {
		pause();
		_exit(1);
	}
	CHECK(stays > 0);
	comes = fork();
	if (comes == 0) {
		signal(SIGCHLD, SIG_IGN);
		for (int turn = 0; turn < 12; turn++)
			if (bproc_rfork(1) == 0)
				_exit(0);
		_exit(0);
	}
	do {
		seen = 0;
		count = bproc_proclist(1, &list);
		CHECK(count >= 1);
		for (int i = 0; i < count; i++) {
			CHECK(list[i].node == 1 && list[i].pid > 0);
			seen += list[i].pid == stays;
			for (int j = 0; j < i; j++)
				CHECK(list[i].pid != list[j].pid);
		}
		CHECK(seen == 1);
		free(list);
	} while (waitpid(comes, NULL, WNOHANG) == 0);
	CHECK(kill(stays, SIGKILL) == 0 && waitpid(stays, NULL, 0) == stays);
}

int main(int argc, char **argv)
{
	struct bproc_node_set_t set = BPROC_EMPTY_NODESET;

	CHECK(argc == 2);
	snprintf(io.d.file.name, sizeof io.d.file.name, "%s/twins", argv[1]);
	io.d.file.flags = O_WRONLY | O_CREAT | O_APPEND;
	io.d.file.mode = 0600;
	one();
	several();
	programs();
	comings_and_goings();
	CHECK(bproc_nodeset_grow(&set, 20) == 0 && set.alloc >= 20 && set.size == 0);
	CHECK(bproc_nodeset_grow(&set, -1) == -1 && errno == EINVAL);
	bproc_nodeset_free(&set);
	return 0;
}
