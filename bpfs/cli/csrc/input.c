/* SPDX-License-Identifier: GPL-2.0-or-later
 * See jobs.h. */
#define _GNU_SOURCE
#include "jobs.h"
#include "nodespec.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHUNK 65536 /* bytes of standard input that are on their way to the nodes */

struct input input;

void close_input(struct job *job)
{
	if (job->input >= 0)
		close(job->input);
	job->input = -1;
}

void send_input(struct job *job)
{
	ssize_t put = write(job->input, input.text + job->sent, input.length - job->sent);
	if (put >= 0)
		job->sent += (size_t)put;
	else if (errno != EAGAIN && errno != EINTR)
		close_input(job); /* it reads no more */
}

int input_idle(void)
{
	int readers = 0;
	for (size_t i = 0; i < job_count; i++) {
		if (jobs[i].started && jobs[i].input < 0)
			continue;
		if (jobs[i].sent < input.length)
			return 0;
		readers++;
	}
	return readers > 0;
}

void read_input(void)
{
	ssize_t got = input.typed_end ? 0 : read(0, input.text, CHUNK);
	if (got < 0 && (errno == EINTR || errno == EAGAIN))
		return;
	if (got <= 0 && input.terminals && !input.typed_end) {
		/* A terminal's input ends where somebody types ^D: twice behind an unfinished line. */
		got = input.unfinished ? 2 : 1;
		memset(input.text, 'D' - '@', (size_t)got);
		input.typed_end = 1;
	} else if (got > 0) {
		input.unfinished = input.text[got - 1] != '\n';
	}
	input.length = got > 0 ? (size_t)got : 0;
	for (size_t i = 0; i < job_count; i++)
		jobs[i].sent = 0;
	if (got > 0)
		return;
	input.ended = 1;
	for (size_t i = 0; i < job_count; i++)
		close_input(&jobs[i]);
}

int prepare_input(const struct options *options)
{
	struct stat status;
	if (options->null[0] || options->file[0])
		return 0;
	input.terminals = options->terminal;
	if (!options->fanout || (size_t)options->fanout >= job_count) {
		input.wanted = 1;
		input.text = must_alloc(NULL, CHUNK);
		return 0;
	}
	/* Those that start later have to read it from its beginning as well. */
	if (fstat(0, &status) == 0 && (S_ISREG(status.st_mode) || S_ISCHR(status.st_mode)))
		return 0;
	complain("--fanout below the number of nodes needs -n, or a file as standard input");
	return -1;
}
