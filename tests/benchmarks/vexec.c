/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * usage: vexec COUNT NODES     bproc_vexecmove of COUNT processes on nodes 1 to NODES, round and round: prints the seconds
 * until it returned, until all have ended, and how many could not be started. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/bproc.h>
#include <sys/wait.h>
#include <time.h>

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	int count = argc == 3 ? atoi(argv[1]) : 0, over = argc == 3 ? atoi(argv[2]) : 0, failed = 0;
	int *nodes = calloc((size_t)count + 1, sizeof *nodes), *pids = calloc((size_t)count + 1, sizeof *pids);
	char *arguments[] = { "true", NULL }, *environment[] = { "BPROC_RANK=XXXXXXXX", NULL };
	double begin = now(), started;

	for (int i = 0; i < count; i++)
		nodes[i] = 1 + i % over;
	if (!count || bproc_vexecmove(count, nodes, pids, "/bin/true", arguments, environment) != count)
		return 1;
	started = now();
	for (int i = 0; i < count; i++)
		if (pids[i] < 0)
			failed++;
		else
			waitpid(pids[i], NULL, 0);
	printf("%f %f %d\n", started - begin, now() - begin, failed);
	return 0;
}
