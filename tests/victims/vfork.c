/* Waits, uninterruptibly, for a child by vfork(2) until it is told to end: no tracer can stop it so long. */
#include "victim.h"

int main(int argc, char **argv)
{
	stop_file = argv[1];
	ready(argc, argv);
	pid_t child = vfork();
	if (child == 0) {
		while (!told_to_end())
			nap();
		_exit(0);
	}
	return child < 0;
}
