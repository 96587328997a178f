/* Checks what is known of nodes, sets of them, their rights and attributes; three nodes, all up, run by root. */
#include "check.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>

int main(void)
{
	struct bproc_node_set_t all = BPROC_EMPTY_NODESET, some = BPROC_EMPTY_NODESET, none = BPROC_EMPTY_NODESET;
	struct bproc_node_info_t info;
	struct bproc_version_t version;
	struct sockaddr_in address;
	int size = sizeof address, length, notifier;
	char text[64];
	struct pollfd ready;

	CHECK(bproc_numnodes() == 3);
	CHECK(bproc_currnode() == BPROC_NODE_MASTER);
	length = bproc_nodestatus(1, text, sizeof text);
	CHECK(length == 2 && !strcmp(text, "up"));
	CHECK(bproc_nodestatus(9, text, sizeof text) == -1 && errno == BE_INVALIDNODE);
	CHECK(!strcmp(bproc_strerror(BE_INVALIDNODE), "Invalid node") && !strcmp(bproc_strerror(EPERM), strerror(EPERM)));
	CHECK(bproc_nodeinfo(2, &info) == 0 && info.node == 2 && info.mode == 0111 && info.user == 0);
	CHECK(!strcmp(info.status, "up") && info.addr.sa_family == AF_INET);
	CHECK(bproc_nodeinfo(BPROC_NODE_MASTER, &info) == 0 && info.node == BPROC_NODE_MASTER);
	CHECK(bproc_nodeinfo(3, &info) == -1 && errno == BE_INVALIDNODE);
	CHECK(bproc_nodeaddr(0, (struct sockaddr *)&address, &size) == 0 && size == sizeof address);
	CHECK(address.sin_addr.s_addr == htonl(INADDR_LOOPBACK));
	size = 3;
	CHECK(bproc_nodeaddr(0, (struct sockaddr *)&address, &size) == -1 && errno == EINVAL);
	CHECK(bproc_version(&version) == 0 && version.magic == BPROC_MAGIC && version.version_string[0]);

	CHECK(bproc_nodelist(&all) == 3 && all.size == 3 && bproc_node_set_node(&all, 1)->node == 1);
	CHECK(bproc_nodespec(&some, "2,0") == 2 && some.node[0].node == 2 && some.node[1].node == 0);
	CHECK(bproc_nodespec(&some, "nonsense") == -1 && errno == EINVAL);
	CHECK(bproc_nodefilter(&some, &all, "1-2") == 2 && some.node[0].node == 1);
	CHECK(bproc_nodeset_append(&some, &some) == 0 && some.size == 4 && some.node[3].node == 2);
	CHECK(bproc_nodeset_init(&none, 100) == 0 && none.size == 0 && none.alloc >= 100);
	CHECK(bproc_nodeset_add(&none, &all.node[0]) == 0 && none.size == 1);
	bproc_nodeset_free(&none);
	CHECK(none.size == 0 && none.node == NULL);

	notifier = bproc_notifier();
	CHECK(notifier >= 0);
	CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD);
	ready = (struct pollfd){ .fd = notifier, .events = POLLIN };
	CHECK(poll(&ready, 1, 0) == 0);
	CHECK(bproc_chmod(1, 0100) == 0 && bproc_nodeinfo(1, &info) == 0 && info.mode == 0100);
	CHECK(poll(&ready, 1, 10000) == 1);
	CHECK(bproc_nodelist_(&all, notifier) == 3 && all.node[1].mode == 0100);
	CHECK(bproc_chown(1, 1234) == 0 && bproc_chgrp(1, 1235) == 0 && bproc_nodeinfo(1, &info) == 0);
	CHECK(info.user == 1234 && info.group == 1235);
	CHECK(bproc_access(1, BPROC_X_OK) == 0 && bproc_access(7, BPROC_X_OK) == -1 && errno == BE_INVALIDNODE);
	CHECK(bproc_access(1, 4) == -1 && errno == EINVAL);
	if (fork() == 0) {
		CHECK(setgid(1300) == 0 && setuid(1300) == 0);
		CHECK(bproc_access(1, BPROC_X_OK) == -1 && errno == EACCES);
		CHECK(bproc_access(0, BPROC_X_OK) == 0);
		CHECK(bproc_setnodeattr(0, "bproc.mine", "x", 1) == -1 && errno == EACCES);
		exit(0);
	}
	CHECK(wait(&length) > 0 && length == 0);
	CHECK(bproc_chown(1, 0) == 0 && bproc_chgrp(1, 0) == 0 && bproc_chmod(1, 0111) == 0);
	close(notifier);

	CHECK(bproc_getnodeattr(1, "bproc.state", text, sizeof text) == 2 && !memcmp(text, "up", 2));
	CHECK(bproc_setnodeattr(1, "rack", "r7", 2) == 0);
	CHECK(bproc_getnodeattr(1, "bproc.rack", text, sizeof text) == 2 && !memcmp(text, "r7", 2));
	CHECK(bproc_getnodeattr(1, "nothing", text, sizeof text) == -1 && errno == ENODATA);
	CHECK(bproc_setnodeattr(1, "bproc.state", "down", 4) == -1 && errno == EPERM);
	CHECK(bproc_setnodeattr(1, "long", text, 65) == -1 && errno == EINVAL);
	CHECK(bproc_setnodeattr(8, "rack", "r7", 2) == -1 && errno == BE_INVALIDNODE);

	CHECK(bproc_nodesetstatus(2, "unavailable") == 0 && bproc_nodestatus(2, text, sizeof text) > 0);
	CHECK(!strcmp(text, "unavailable"));
	CHECK(bproc_nodesetstatus(2, "up") == 0);
	CHECK(bproc_nodesetstatus(2, "happy") == -1 && errno == EINVAL);
	CHECK(bproc_nodechroot(2, "/") == -1 && errno == ENOSYS);
	bproc_nodeset_free(&all);
	bproc_nodeset_free(&some);
	return 0;
}
