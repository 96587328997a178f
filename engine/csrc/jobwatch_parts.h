/* What jobwatch's parts know of each other.
 * SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef JOBWATCH_PARTS_H
#define JOBWATCH_PARTS_H

#include "jobwatch.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HOLD_MS 5
#define REAP_MS 2 /* between looks whether an ended process has been waited for; doubles each time */

struct client {
	int fd, proc, namespace;
	bool active;       /* events of its jobs are wanted */
	int64_t look_at;   /* next look at all its jobs */
	int64_t busy;      /* when it had jobs last, or was told that some come */
	char packet[PACKET_MAX];
	size_t filled;
};

struct job {
	struct job *next, **link;             /* in its bucket */
	struct job *later, *sooner;           /* all jobs of everybody */
	struct client *client;
	int global, pid, parent; /* parent: global, as far as it is known; else 0 */
	bool reported, ended, told_end, placeholder, seen;
	int code, first_code; /* wait status; that of the first thread, which may leave others behind */
	int64_t due;      /* when it is to be read or looked at; 0: not before the next look at all */
	int64_t backoff;
	uint64_t print;   /* of what was told last and no event tells: parent, group, session, state */
};

struct stat_line {
	char comm[16], state;
	int ppid, pgid, sid, tty, threads, code;
};

/* ---- jobwatch_jobs.c ---- */

extern struct job jobs;   /* the head of the list of all jobs */
extern int64_t next_due; /* no job is due before */

int64_t now_ms(void);
struct job *find(int global);
struct job *add(struct client *client, int global, int pid, int parent);
void forget(struct job *job);
void due(struct job *job, int64_t when);
/* The job namespace's number of a process; 0 when it is gone. */
int inner(const struct client *client, int global);
/* Ours of one of the job namespace's; 0 when it is gone, -1 where the kernel cannot tell. */
int outer(const struct client *client, int pid);
/* It has ended, with this wait status; -1: nobody knows. */
void finish(struct job *job, int code);
/* Its end was missed, and its number is another's now. */
void lose(struct job *job);
/* Reads how it is and tells what is new of it. It may be forgotten then. */
void look(struct job *job, int64_t now, bool changed);

/* ---- jobwatch_records.c ---- */

bool read_stat(const struct job *job, struct stat_line *s);
bool is_placeholder(const struct stat_line *s);
/* Whether a placeholder that is stopped was ordered to. */
bool was_ordered(const struct stat_line *s);
/* Of what is told of a process and no event says. */
uint64_t print_of(const struct stat_line *s);
/* Tells how a process is now. */
void tell(struct job *job, const struct stat_line *s);
void tell_end(struct job *job, enum record_kind kind);
/* Tells what became of a placeholder, for whom it stands for. */
void tell_stood(struct job *job, char state);
void flush_packet(struct client *client);

/* ---- jobwatch_connector.c ---- */

extern int events;     /* the connector's socket; -1 while it is not listened to */
extern bool answering; /* it has said something: we are where it speaks */

/* False: it cannot be. */
bool listen_to_kernel(void);
void stop_listening(void);
/* Takes all that there is. False: events were lost. */
bool read_events(void);

#endif
