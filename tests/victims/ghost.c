/* A stand-in for the real ghost: says "ghost" on its control socket (BPFS_CONTROL), then answers every packet with its pid, and
 * exits 77 at the end of the socket. */
#include "victim.h"
#include <sys/socket.h>
#include <sys/syscall.h>

/* Like the real one: what its file grants becomes effective. */
static void take_rights(void)
{
	uint32_t head[2] = {0x20080522, 0}, sets[6];
	CHECK(!syscall(SYS_capget, head, sets));
	sets[3] |= sets[4] & 1u << 8;
	CHECK(!syscall(SYS_capset, head, sets));
}

int main(void)
{
	int control = atoi(getenv("BPFS_CONTROL"));
	int ids[2] = {getpid(), getppid()};
	char packet[64];
	take_rights();
	CHECK(send(control, "ghost", 5, 0) == 5);
	while (recv(control, packet, sizeof packet, 0) > 0)
		CHECK(send(control, ids, sizeof ids, 0) == sizeof ids);
	return 77;
}
