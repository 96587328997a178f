/* Checks what ends nodes, which start afresh or not; six nodes, all up, run by root. */
#include "check.h"

#include <time.h>

static void wait_for(int node, const char *state)
{
	char text[16];

	for (int tries = 0; tries < 3000; tries++) {
		CHECK(bproc_nodestatus(node, text, sizeof text) > 0);
		if (!strcmp(text, state))
			return;
		nanosleep(&(struct timespec){ .tv_nsec = 10000000 }, NULL);
	}
	CHECK(!"the state was not reached within 30 s");
}

int main(void)
{
	struct sockaddr address = { .sa_family = AF_INET };

	/* A virtual node's reboot is a new start of its slave, and it is up again. */
	CHECK(bproc_nodereboot(0) == 0 && bproc_nodereboot_async(1) == 0);
	CHECK(bproc_nodehalt(2) == 0 && bproc_nodehalt_async(3) == 0);
	CHECK(bproc_nodepwroff(4) == 0 && bproc_nodepwroff_async(5) == 0);
	for (int node = 0; node < 6; node++)
		wait_for(node, node < 2 ? "up" : "down");
	CHECK(bproc_nodereboot(9) == -1 && errno == BE_INVALIDNODE);
	CHECK(bproc_nodereboot(2) == -1 && errno == BE_NODEDOWN);
	CHECK(bproc_nodereconnect(0, &address, sizeof address, &address, sizeof address) == -1 && errno == ENOSYS);
	return 0;
}
