/* The jobs that jobwatch knows: which there are, when each is to be looked at, and how they end.
 * SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#include "inside.h"
#include "jobwatch_parts.h"

#include <time.h>

#define REAP_MOST_MS 250
#define BUCKETS 4096
#define PID_FROM_PIDNS 0x8004b706u /* linux/nsfs.h, since 6.11 */

static struct job *buckets[BUCKETS];
struct job jobs = { .later = &jobs, .sooner = &jobs };
int64_t next_due = INT64_MAX;

int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

struct job *find(int global)
{
	struct job *job = buckets[global % BUCKETS];

	while (job && job->global != global)
		job = job->next;
	return job;
}

void due(struct job *job, int64_t when)
{
	if (!job->due || when < job->due)
		job->due = when;
	if (job->due < next_due)
		next_due = job->due;
}

struct job *add(struct client *client, int global, int pid, int parent)
{
	struct job *job = calloc(1, sizeof(*job));
	struct job **bucket = &buckets[global % BUCKETS];

	if (!job)
		exit(1);
	job->client = client;
	job->global = global;
	job->pid = pid;
	job->parent = parent;
	job->code = job->first_code = -1;
	job->placeholder = pid == 1;
	job->next = *bucket;
	job->link = bucket;
	if (job->next)
		job->next->link = &job->next;
	*bucket = job;
	job->later = &jobs;
	job->sooner = jobs.sooner;
	jobs.sooner->later = job;
	jobs.sooner = job;
	return job;
}

void forget(struct job *job)
{
	*job->link = job->next;
	if (job->next)
		job->next->link = job->link;
	job->later->sooner = job->sooner;
	job->sooner->later = job->later;
	free(job);
}

int inner(const struct client *client, int global)
{
	return inside(client->namespace, global);
}

int outer(const struct client *client, int pid)
{
	int global = ioctl(client->namespace, PID_FROM_PIDNS, pid);

	if (global >= 0 || errno == ESRCH)
		return global > 0 ? global : 0;
	return -1; /* an older kernel */
}

/* Whether nobody waits for it, nor for who it stands for, but nodeinit or a placeholder: what nobody asks for. */
static bool idle(const struct job *job)
{
	const struct job *parent = find(job->parent);

	/* Without a print it has not been looked at since it did something, and may be a job by now. */
	return parent && parent->client == job->client && (parent->pid == 1 || (parent->placeholder && parent->print));
}

/* Who it stands for shall hear of it. */
static void stood(struct job *job, char state)
{
	if (idle(job))
		return;
	if (state == 'Z' && job->code < 0 && outer(job->client, job->pid) > 0)
		return; /* noticed late, and followed by another already */
	tell_stood(job, state);
}

/* A process that ended is a zombie until its parent has waited for it. */
static void look_for_reaper(struct job *job, int64_t now)
{
	if (inner(job->client, job->global) != job->pid) {
		if ((job->reported || job->placeholder) && !idle(job))
			tell_end(job, RECORD_REAPED);
		forget(job);
		return;
	}
	job->backoff = job->backoff ? job->backoff * 2 : REAP_MS;
	if (job->backoff > REAP_MOST_MS)
		job->backoff = REAP_MOST_MS;
	due(job, now + job->backoff);
}

/* The kernel gives the children of a placeholder that has ended to nodeinit. */
static void hand_on_children(const struct job *job)
{
	int init = outer(job->client, 1);

	for (struct job *child = jobs.later; child != &jobs; child = child->later)
		if (child->parent == job->global && child->client == job->client)
			child->parent = init > 0 ? init : 0;
}

void finish(struct job *job, int code)
{
	if (job->ended)
		return;
	job->ended = true;
	if (job->placeholder && job->print)
		hand_on_children(job);
	job->code = code < 0 ? job->first_code : code;
	job->backoff = 0;
	if (job->reported)
		tell_end(job, RECORD_ENDED);
	else if (job->placeholder)
		stood(job, 'Z');
	/* What nobody has heard of yet keeps the time at which it was to be told of. */
	if (job->reported || job->placeholder || !job->due)
		due(job, now_ms());
}

void lose(struct job *job)
{
	finish(job, -1);
	if (job->reported || job->placeholder)
		tell_end(job, RECORD_REAPED);
	forget(job);
}

void look(struct job *job, int64_t now, bool changed)
{
	struct stat_line s;

	job->due = 0;
	if (job->pid == 1)
		return;
	if (job->ended && (job->reported || job->placeholder)) {
		look_for_reaper(job, now);
		return;
	}
	if (!read_stat(job, &s)) {
		finish(job, -1);
		if (job->ended)
			look_for_reaper(job, now);
		return;
	}
	job->placeholder = is_placeholder(&s);
	if (s.state == 'Z' && s.threads <= 1 && !job->ended)
		finish(job, s.code);
	if (job->placeholder) {
		job->reported = false; /* a job that has left, and is stood for; or it has always been one */
		if (s.state == 'T' && !was_ordered(&s) && print_of(&s) != job->print)
			stood(job, s.state);
		job->print = print_of(&s);
		return;
	}
	if (changed || !job->reported || print_of(&s) != job->print)
		tell(job, &s);
	if (job->ended) {
		tell_end(job, RECORD_ENDED);
		look_for_reaper(job, now);
	}
}
