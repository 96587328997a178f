/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * bpsh: what its parts share.
 */
#ifndef BPSH_H
#define BPSH_H

#include <stddef.h>

/* Exit codes of our own, as ssh(1) and sh(1) have them. */
enum {
	EXIT_OUTPUT = 1,    /* the commands went well, but what they said got lost */
	EXIT_TIMEOUT = 124, /* --timeout, as timeout(1) */
	EXIT_CANNOT_RUN = 126,
	EXIT_NOT_FOUND = 127,
	EXIT_FAILED = 255, /* a node or the cluster, not the command */
};

struct options {
	const char *mount;     /* where the cluster is mounted */
	char *const *argv;     /* the command, argv[0] as typed */
	const char *program;   /* the file of argv[0] in our PATH */
	const char *file[3];   /* -I -O -E: opened on the node; NULL: connected to ours */
	int null[3];           /* -n, -N: /dev/null instead */
	int lines, prefix;     /* -L, -p */
	int sequential, dividers; /* -s, -d */
	int terminal;          /* -T: a terminal for each */
	int gather, json;      /* -g, --json */
	int times;             /* -t */
	int bproc_exit;        /* 255 for every death by signal */
	int fanout;            /* how many at a time; 0: all */
	double timeout;        /* seconds for each node; 0: none */
	size_t buffer;         /* -b: longest line that is kept whole, bytes of a read */
};

/* What is to be exec'd. */
struct command {
	const char *program;
	char *const *argv;
};

/* Gives this process environment and standard descriptors of the command with that rank; returns 0, or an exit code. */
int prepare_command(const struct options *options, const char *rank, struct command *command);

/* Turns into the command. Only returns, with an exit code, when that failed; the reason is on stderr by then. */
int run_command(const struct command *command);

/* The same, with the move to a node armed before. */
int run_command_on(const struct options *options, int node, const struct command *command);

/* Runs the command on several nodes at once; returns the exit code. */
int run_many(const struct options *options, const int *node, size_t count);

/* One line on stderr: "bpsh: ...". */
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Seconds on the monotonic clock. */
double now(void);

#endif
