/* Checks what there is without a cluster: the master itself. */
#include "check.h"

int main(void)
{
	struct bproc_node_set_t set = BPROC_EMPTY_NODESET;
	struct bproc_version_t version;
	char *none[] = { "true", NULL }, text[16];
	int pid, status;

	CHECK(bproc_currnode() == BPROC_NODE_MASTER);
	CHECK(bproc_numnodes() == -1 && errno == ENOSYS);
	CHECK(bproc_nodelist(&set) == -1 && errno == ENOSYS);
	CHECK(bproc_nodespec(&set, "0") == -1 && errno == ENOSYS);
	CHECK(bproc_notifier() == -1 && errno == ENOSYS);
	CHECK(bproc_version(&version) == -1 && errno == ENOSYS);
	CHECK(bproc_nodestatus(0, text, sizeof text) == -1 && errno == ENOSYS);
	CHECK(bproc_move(0) == -1 && errno == ENOSYS);
	CHECK(bproc_move(BPROC_NODE_MASTER) == 0);
	pid = bproc_rfork(BPROC_NODE_MASTER);
	CHECK(pid >= 0);
	if (pid == 0)
		bproc_execmove(BPROC_NODE_MASTER, "/bin/true", none, none + 1);
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	return 0;
}
