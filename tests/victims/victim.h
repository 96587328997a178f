/* A victim works in rounds: it sets something up, says "ready", then checks it every 10 ms until it is told to end (SIGTERM or
 * the file named by argv[1] appears); it exits 0 when all was well and says what was not on stderr. */
#ifndef VICTIM_H
#define VICTIM_H
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                                       \
	do {                                                                                   \
		if (!(condition)) {                                                            \
			fprintf(stderr, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno); \
			exit(1);                                                               \
		}                                                                              \
	} while (0)

static const char *stop_file;

static void ready(int argc, char **argv)
{
	CHECK(argc > 1);
	stop_file = argv[1];
	char name[4096], early[4096];
	snprintf(name, sizeof name, "%s.ready", stop_file);
	snprintf(early, sizeof early, "%s.early", stop_file);
	FILE *file = fopen(early, "w");
	CHECK(file && !fclose(file));
	CHECK(!rename(early, name)); /* nothing is open any more when it is seen */
}

static int told_to_end(void)
{
	struct stat info;
	return stat(stop_file, &info) == 0;
}

static void nap(void)
{
	struct timespec t = {0, 5000000};
	while (nanosleep(&t, &t) < 0 && errno == EINTR)
		;
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}
#endif
