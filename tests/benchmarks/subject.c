/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The process that benchmarks move: `subject BYTES [CHILDREN]` fills that much memory and says "ready"; then, for each
 * byte on standard input, it runs a piece of work and says how many ns that took, by the clock and of processor
 * time: `c` computes, `s` makes system calls. Its children have as much memory each, and wait until it ends. */
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define STEPS 20000000u /* about 40 ms */
#define CALLS 100000u   /* the same */

static volatile uint64_t result;

static uint64_t now(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void compute(void)
{
	uint64_t x = result + 88172645463325252u;
	for (unsigned i = 0; i < STEPS; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
	}
	result = x;
}

static void call(int zero)
{
	char data[64];
	for (unsigned i = 0; i < CALLS; i++) {
		syscall(SYS_getppid);
		if (read(zero, data, sizeof data) != sizeof data)
			exit(1);
	}
}

static void fill(size_t bytes)
{
	unsigned char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		exit(1);
	for (size_t i = 0; i < bytes; i += 4096)
		memset(memory + i, (int)(i / 4096 % 255 + 1), 4096);
}

int main(int argc, char **argv)
{
	size_t bytes = argc > 1 ? strtoull(argv[1], NULL, 10) : 0;
	int zero = open("/dev/zero", O_RDONLY), children = argc > 2 ? atoi(argv[2]) : 0, made[2];
	if (pipe(made))
		return 1;
	for (int i = 0; i < children; i++)
		if (!fork()) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			fill(bytes);
			write(made[1], "", 1);
			for (;;)
				pause();
		}
	if (bytes)
		fill(bytes);
	for (char one; children-- > 0;)
		if (read(made[0], &one, 1) != 1)
			return 1;
	close(made[0]);
	close(made[1]);
	dprintf(1, "ready\n");
	for (char what; read(0, &what, 1) == 1;) {
		uint64_t start = now(CLOCK_MONOTONIC), used = now(CLOCK_PROCESS_CPUTIME_ID);
		if (what == 'c')
			compute();
		else
			call(zero);
		used = now(CLOCK_PROCESS_CPUTIME_ID) - used;
		start = now(CLOCK_MONOTONIC) - start;
		dprintf(1, "%llu %llu\n", (unsigned long long)start, (unsigned long long)used);
	}
	return 0;
}
