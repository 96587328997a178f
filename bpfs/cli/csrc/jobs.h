/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * bpsh on several nodes: the commands that run, and the standard input that they share.
 */
#ifndef BPSH_JOBS_H
#define BPSH_JOBS_H

#include "bpsh.h"
#include "output.h"

#include <sys/types.h>

struct job {
	int node, rank;
	volatile pid_t pid;     /* 0: not yet started, or reaped */
	int input;              /* our end of its standard input; -1: closed */
	size_t sent;            /* bytes of the current chunk */
	struct stream stream[2];
	int started, reaped, done;
	int waits;              /* for the order that it is part of (batch.h) */
	int timed_out, killed;
	int status;             /* of wait(2) */
	double begin, end;
};

extern struct job *jobs;
extern size_t job_count;
extern int apart; /* -T: the commands are in sessions of their own, where no signal of our terminal reaches them */

/* Room for the descriptors of so many commands. */
void raise_file_limit(size_t count);

/* Starts a command; returns -1, with its status set, when that failed. */
int start_job(const struct options *options, struct job *job);

/* Starts the template of an order; returns -1 when that failed. */
int start_template(const struct options *options);

/* Our ends of its standard descriptors. */
void close_streams(struct job *job);

/* Standard input: one chunk is on its way to all of them, and the next is read when the slowest has this one. */
struct input {
	char *text;
	size_t length;
	int wanted, ended;
	int terminals;  /* it goes to terminals, whose end is typed */
	int unfinished; /* the last byte was no line's end */
	int typed_end;
};
extern struct input input;

/* Decides how standard input is shared; returns -1 when it cannot be. */
int prepare_input(const struct options *options);

/* Whether the next chunk may be read: everybody has all of this one, and somebody wants more. */
int input_idle(void);
void read_input(void);

/* One command's share. */
void send_input(struct job *job);
void close_input(struct job *job);

#endif
