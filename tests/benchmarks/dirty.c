/* SPDX-License-Identifier: GPL-2.0-or-later */
/* `dirty BYTES RATE` fills that much memory, says "ready", and then writes RATE pages a second, spread at random. For
 * each byte on standard input it says, of the time since the last: pages written, ns that the writes took, ns that it
 * lasted, and the longest ns between two turns, which are a millisecond apart. */
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define TURN 1000000u

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	size_t pages = strtoull(argv[1], NULL, 10) / PAGE;
	uint64_t rate = strtoull(argv[2], NULL, 10), x = 88172645463325252u;
	unsigned char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 1;
	for (size_t i = 0; i < pages; i++)
		memset(memory + i * PAGE, (int)(i % 255 + 1), PAGE);
	dprintf(1, "ready\n");
	uint64_t begun = now(), last = begun, written = 0, took = 0, longest = 0;
	for (;;) {
		struct pollfd input = {0, POLLIN, 0};
		struct timespec pause = {0, TURN};
		nanosleep(&pause, NULL);
		uint64_t start = now();
		if (start - last > longest)
			longest = start - last;
		last = start;
		uint64_t due = (start - begun) * rate / 1000000000u;
		if (due > written + rate / 50) /* what a stop has cost is not made up for all at once */
			due = written + rate / 50;
		for (; written < due; written++) {
			x ^= x << 13, x ^= x >> 7, x ^= x << 17;
			memset(memory + x % pages * PAGE, (int)x, PAGE);
		}
		took += now() - start;
		char what;
		if (poll(&input, 1, 0) == 1) {
			if (read(0, &what, 1) != 1)
				return 0;
			dprintf(1, "%llu %llu %llu %llu\n", (unsigned long long)written, (unsigned long long)took,
				(unsigned long long)(now() - begun), (unsigned long long)longest);
			begun = last = now();
			written = took = longest = 0;
		}
	}
}
