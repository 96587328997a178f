/* Has what a move leaves behind: memory policies (its own, and of a mapping) and a session keyring. It runs on with those of its node, and
 * "home" again with its own as they were when it left, but for the mapping's. All its memory is there. */
#include "victim.h"
#include <linux/keyctl.h>
#include <linux/mempolicy.h>

static int policy(void *address)
{
	int mode = -1;
	CHECK(!syscall(SYS_get_mempolicy, &mode, 0, 0, address, address ? MPOL_F_ADDR : 0));
	return mode;
}

int main(int argc, char **argv)
{
	unsigned long first = 1;
	size_t size = 1 << 20;
	unsigned char *bound = mmap(0, size, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *plain = bound + size / 2;
	CHECK(bound != MAP_FAILED);
	int numa = !syscall(SYS_set_mempolicy, MPOL_PREFERRED, &first, 8);
	CHECK(numa || errno == ENOSYS);
	CHECK(!numa || !syscall(SYS_mbind, bound, size / 2, MPOL_BIND, &first, 8, 0));
	CHECK(!numa || (policy(0) == MPOL_PREFERRED && policy(bound) == MPOL_BIND));
	long keys = syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0);
	for (size_t i = 0; i < size; i++)
		bound[i] = (unsigned char)(i * 13 >> 2);
	ready(argc, argv);
	while (!told_to_end())
		nap();
	for (size_t i = 0; i < size; i++)
		CHECK(bound[i] == (unsigned char)(i * 13 >> 2));
	int home = argc > 2 && !strcmp(argv[2], "home"), own = home ? MPOL_PREFERRED : MPOL_DEFAULT;
	CHECK(!numa || (policy(0) == own && policy(bound) == MPOL_DEFAULT && policy(plain) == MPOL_DEFAULT));
	long now_keys = syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 0);
	CHECK(keys < 0 || (now_keys == keys) == home);
	CHECK(!numa || !syscall(SYS_set_mempolicy, MPOL_BIND, &first, 8)); /* it may choose again */
	memset(bound, 1, size);
	return 0;
}
