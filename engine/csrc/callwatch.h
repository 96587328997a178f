/* What callwatch and the Python side (engine/callwatch.py) share.
 * SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef CALLWATCH_H
#define CALLWATCH_H

#include <stdint.h>

/* From the node's daemon. The first is ORDER_SPACE, with three descriptors: the jobs' /proc, their pid namespace, and a
 * file for notes of calls that are being answered, which outlives this process. */
enum order_kind {
	ORDER_SPACE = 1,
	ORDER_LISTEN = 2, /* + a listener (seccomp_unotify(2)); token: its number; error: its slot, see struct notes */
	ORDER_ANSWER = 3, /* to the question with this token */
};

struct order {
	uint32_t kind, token;
	int32_t error;  /* the call fails with it; 0: it succeeds, and the kernel does nothing */
	int32_t native; /* 1: the kernel makes the call */
};

enum question_kind {
	ASK_SIGNAL = 1, /* a job sends a signal to what is not a process of this node, or not one alone */
	ASK_BORN = 2,   /* `pid` was forked, and stands still until the answer */
	TELL_OVER = 3,  /* nobody is under the listener `token` any more */
};

/* Pids are the job namespace's own. */
struct question {
	uint32_t kind, token;
	int32_t pid;    /* who makes the call */
	int32_t target; /* as kill(2) has it */
	int32_t signo, code;
	uint64_t value; /* si_value */
};

#define NOTES 1024
struct note {
	uint64_t id;       /* of a call that was taken and not answered yet; 0: none */
	uint64_t listener; /* its number */
};

/* The kernel itself writes a call that is taken into its listener's slot: none is lost. */
#define SLOTS 8192
#define SLOT_BYTES 512 /* struct seccomp_notif, which a newer kernel may have made longer */
struct notes {
	struct note calls[NOTES];
	char slots[SLOTS][SLOT_BYTES];
};

#endif
