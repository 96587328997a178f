/* What callwatch's parts know of each other.
 * SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef CALLWATCH_PARTS_H
#define CALLWATCH_PARTS_H

#include "callwatch.h"

#include <linux/seccomp.h>
#include <stdbool.h>

#define ANSWER_MS 5000  /* the master has not been heard of for so long: its node is about to be lost */

/* ---- callwatch.c ---- */

extern int proc_fd, namespace_fd; /* the jobs' /proc and their pid namespace */

int64_t now_ms(void);
/* False: the daemon does not listen. */
bool put(const struct question *question);
uint32_t new_token(void);
/* `of` is what its events come with. */
void watch(int fd, uint32_t what, void *of);
void unwatch(int fd);

/* ---- callwatch_takers.c ---- */

struct listener;

struct taken { /* a call */
	struct listener *from;
	int noted;
	struct seccomp_notif call; /* id 0: the listener is over */
};

/* The end of the pipe at which taken calls arrive; -1: errno says why not. */
int start_taking(void);
/* Maps the file for notes. */
void take_notes(int fd);
void listen_to(int fd, uint32_t number, int slot);
/* False: there is none. */
bool next_taken(struct taken *taken);
/* Nobody is under this listener any more: its taker shall say so, if it has not just done. */
void wake_taker(const void *of);
/* Its taker has said so. */
void drop_listener(struct listener *listener);
/* With an errno, or has the kernel make the call. False: it is not waited for any more. */
bool answer(const struct listener *from, uint64_t id, int error, bool native);
void drop_note(int index);

/* ---- callwatch_births.c ---- */

/* Lets a call go on that makes a child, which stands still until `let_be_born`. */
void begin_birth(const struct listener *from, const struct seccomp_notif *n);
/* The child has its ghost. False: this is no birth's token. */
bool let_be_born(uint32_t token);
void wait_for_tracees(int signals);
/* Ends what has taken too long. */
void give_up_births(int64_t now);
/* Of the next birth that will have. */
int64_t births_deadline(void);

/* ---- callwatch_reading.c ---- */

/* Whether a process of this node, and not what stands for one elsewhere, has this number of the jobs'. */
bool lives_here(int pid);
/* Of ours. */
bool is_placeholder(int outer);
bool forks(const struct seccomp_notif *n);
/* What a call says of a signal; false: it is none, or none of ours. */
bool read_signal(const struct seccomp_notif *n, struct question *q);

#endif
