/* ghost_heir.c - how the ghost outlives its master, and finds the next one.
 *
 * The ghost keeps a second control socket, with both of its ends. When the master dies, the ghost goes on with that one,
 * in which its words wait; the next master takes the far end out of the ghost (pidfd_getfd), for which the ghost need
 * not even run: it may be stopped. BPFS_HEIR in the environment says where it is; its text is changed in place.
 */
#define _GNU_SOURCE
#include "ghost.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int heir = -1; /* the end that is for the next master */
static int ours = -1; /* the other, while there is a master */

static void publish(void)
{
	char *text = getenv("BPFS_HEIR");
	int number = heir < 0 ? 0 : heir;

	for (size_t i = text ? strlen(text) : 0; i; i--, number /= 10)
		text[i - 1] = '0' + number % 10;
}

void heir_forget(void)
{
	heir = ours = -1;
}

void heir_make(void)
{
	int ends[2], on = 1;

	if (getenv("BPFS_HEIR") && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0) {
		heir = high_fd(ends[0]);
		ours = high_fd(ends[1]);
		close(ends[0]);
		close(ends[1]);
		setsockopt(ours, SOL_SOCKET, SO_PASSCRED, &on, sizeof(on));
	}
	publish();
}

void heir_close(void)
{
	if (heir >= 0)
		close(heir);
	if (ours >= 0)
		close(ours);
	heir_forget();
}

/* The master is dead. From now on the control socket, under the number that it had, is the one for the next. */
int heir_follow(int number)
{
	int fd = ours < 0 ? -1 : dup3(ours, number, O_CLOEXEC);

	if (ours >= 0)
		close(ours);
	ours = -1;
	return fd;
}

/* It has come: its death shall be seen, too, so its end must not be ours as well. */
void heir_taken(void)
{
	heir_close();
	heir_make();
}
