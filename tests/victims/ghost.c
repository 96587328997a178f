/* A stand-in for the real ghost: says "ghost" on its control socket (BPFS_CONTROL), then answers every packet with its pid, and
 * exits 77 at the end of the socket. */
#include "victim.h"
#include <sys/socket.h>

int main(void)
{
	int control = atoi(getenv("BPFS_CONTROL"));
	int ids[2] = {getpid(), getppid()};
	char packet[64];
	CHECK(send(control, "ghost", 5, 0) == 5);
	while (recv(control, packet, sizeof packet, 0) > 0)
		CHECK(send(control, ids, sizeof ids, 0) == sizeof ids);
	return 77;
}
