/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Words that a process shares with its children: who waits for one to change sleeps until then.
 */
#ifndef BPFS_BOARD_H
#define BPFS_BOARD_H

#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* futex(2), without the kernel's headers */
#define FUTEX_WAIT 0
#define FUTEX_WAKE 1

/* So many words, all 0; NULL with errno where there is no memory. To be given back by munmap(2). */
static inline int *board_make(size_t words)
{
	void *board = mmap(NULL, words * sizeof(int), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	return board == MAP_FAILED ? NULL : board;
}

static inline void board_say(int *word, int what)
{
	__atomic_store_n(word, what, __ATOMIC_SEQ_CST);
	syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* Waits until a word is no longer 0, so many seconds at most; returns what it is then. */
static inline int board_hear(int *word, int seconds)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	time_t end = time.tv_sec + seconds;
	for (;;) {
		int what = __atomic_load_n(word, __ATOMIC_SEQ_CST);
		clock_gettime(CLOCK_MONOTONIC, &time);
		if (what || time.tv_sec >= end)
			return what;
		struct timespec left = {.tv_sec = end - time.tv_sec};
		syscall(SYS_futex, word, FUTEX_WAIT, 0, &left, NULL, 0);
	}
}

#endif
