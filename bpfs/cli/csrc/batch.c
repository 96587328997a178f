/* SPDX-License-Identifier: GPL-2.0-or-later
 * See batch.h. */
#define _GNU_SOURCE
#include "batch.h"
#include "board.h"
#include "nodespec.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MOST 2048         /* processes of one order */
#define WAIT_SECONDS 100  /* the cluster gives up after 60 */
#define PAIR_LENGTH 40    /* " PID:NODE:RANK" */

enum { WAIT, GO, GIVE_UP }; /* words of the board */

struct job template_job = {.input = -1, .stream = {{.fd = -1}, {.fd = -1}}};
static int order = -1;  /* procs/onexec, open for writing */
static int hopeless;    /* there is no such file */
static int *board;      /* shared with all of them: a word a job, and that of the template */

int batch_wanted(const struct options *options, size_t count)
{
	char path[4096];
	if (apart || hopeless || count < 2 || batch_busy())
		return 0;
	if (order < 0) {
		snprintf(path, sizeof path, "%s/procs/onexec", options->mount);
		order = open(path, O_WRONLY | O_CLOEXEC);
		board = order < 0 ? NULL : board_make(job_count + 1);
		hopeless = !board;
	}
	return hopeless ? 0 : count > MOST ? MOST : (int)count;
}

void batch_wait(const struct job *job)
{
	if (board_hear(&board[job - jobs], WAIT_SECONDS) != WAIT)
		return;
	complain("node %d: no answer from the cluster within %d s", job->node, WAIT_SECONDS);
	_exit(EXIT_FAILED);
}

void batch_wait_template(void)
{
	if (board_hear(&board[job_count], WAIT_SECONDS) != GO)
		_exit(EXIT_FAILED);
}

void batch_give_up(void)
{
	for (size_t i = 0; i < job_count; i++)
		if (jobs[i].waits)
			board_say(&board[i], GO);
}

int batch_busy(void)
{
	return template_job.pid > 0;
}

void batch_ended(int status)
{
	close_streams(&template_job);
	template_job.pid = 0;
	if (status)
		batch_give_up();
	for (size_t i = 0; i < job_count; i++)
		jobs[i].waits = 0;
}

/* The order: the template, and the others with their nodes and ranks. */
static char *write_order(void)
{
	char *text = must_alloc(NULL, 16 + PAIR_LENGTH * job_count), *at = text;
	at += sprintf(at, "%d", (int)template_job.pid);
	for (size_t i = 0; i < job_count; i++)
		if (jobs[i].waits && jobs[i].pid)
			at += sprintf(at, " %d:%d:%d", (int)jobs[i].pid, jobs[i].node, jobs[i].rank);
	return text;
}

/* Some were refused: the file's last lines, `PID NODE OUTCOME ...`, tell which. By themselves they will hear why. */
static void free_refused(const struct options *options)
{
	char path[4096], *line_state = NULL;
	snprintf(path, sizeof path, "%s/procs/onexec", options->mount);
	char *text = read_whole(path);
	for (char *line = text ? strtok_r(text, "\n", &line_state) : NULL; line; line = strtok_r(NULL, "\n", &line_state)) {
		int pid, node;
		char outcome[16];
		if (sscanf(line, "%d %d %15s", &pid, &node, outcome) != 3 || !strcmp(outcome, "ok"))
			continue;
		for (size_t i = 0; i < job_count; i++)
			if (jobs[i].waits && jobs[i].pid == pid && jobs[i].node == node)
				board_say(&board[i], GO);
	}
	free(text);
}

void batch_send(const struct options *options)
{
	board[job_count] = WAIT;
	if (start_template(options) < 0) {
		batch_give_up();
		return;
	}
	char *text = write_order();
	int failed = write(order, text, strlen(text)) < 0;
	free(text);
	if (failed && errno == EREMOTEIO) {
		free_refused(options);
		failed = 0;
	}
	if (failed)
		batch_give_up();
	board_say(&board[job_count], failed ? GIVE_UP : GO);
}
