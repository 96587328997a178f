/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * bpsh on several nodes: a child a node that becomes the command's ghost, and a pipe for each of its standard input,
 * output and error. One loop moves the bytes; nothing is kept that does not have to be: a slow reader of ours slows the
 * commands, and standard input goes at the pace of the slowest.
 */
#define _GNU_SOURCE
#include "batch.h"
#include "jobs.h"
#include "nodespec.h"
#include "signals.h"
#include "terminal.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define KILL_SECONDS 2.0 /* from SIGTERM to SIGKILL when a command took too long */

struct job *jobs;
size_t job_count;
int apart;

/* -- the end of a command ----------------------------------------------------------------------------------------- */

static void reap(void)
{
	int status;
	pid_t pid;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		if (pid == template_job.pid) {
			batch_ended(status);
			continue;
		}
		for (size_t i = 0; i < job_count; i++)
			if (jobs[i].pid == pid) {
				jobs[i].pid = 0;
				jobs[i].reaped = 1;
				jobs[i].status = status;
				jobs[i].end = now();
			}
	}
}

static int exit_code(const struct options *options, const struct job *job)
{
	if (job->timed_out)
		return EXIT_TIMEOUT;
	if (WIFSIGNALED(job->status))
		return options->bproc_exit ? EXIT_FAILED : 128 + WTERMSIG(job->status);
	return WEXITSTATUS(job->status);
}

static void print_json(const struct options *options, const struct job *job)
{
	char text[256];
	int length = snprintf(text, sizeof text, "{\"node\": %d, \"rank\": %d, \"exit\": ", job->node, job->rank);
	if (WIFSIGNALED(job->status))
		length += snprintf(text + length, sizeof text - (size_t)length, "null, \"signal\": %d", WTERMSIG(job->status));
	else
		length += snprintf(text + length, sizeof text - (size_t)length, "%d, \"signal\": null", exit_code(options, job));
	length += snprintf(text + length, sizeof text - (size_t)length, ", \"timeout\": %s, \"seconds\": %.3f, \"stdout\": ",
			   job->timed_out ? "true" : "false", job->end - job->begin);
	print_bytes(text, (size_t)length);
	print_json_string(job->stream[0].text, job->stream[0].length);
	print_bytes(", \"stderr\": ", 12);
	print_json_string(job->stream[1].text, job->stream[1].length);
	print_bytes("}\n", 2);
}

/* Both outputs are at their end and the command is reaped. */
static void finish_job(const struct options *options, struct job *job)
{
	job->done = 1;
	close_input(job);
	if (job->timed_out)
		complain("node %d: timed out after %g s", job->node, options->timeout);
	else if (WIFSIGNALED(job->status) && WTERMSIG(job->status) != SIGPIPE && !interrupts)
		complain("node %d: %s", job->node, strsignal(WTERMSIG(job->status)));
	if (options->times)
		dprintf(2, "%3d: %.3f s\n", job->node, job->end - job->begin);
	if (options->json)
		print_json(options, job);
}

static void watch_time(const struct options *options, struct job *job, double time)
{
	double limit = job->begin + options->timeout + (job->timed_out ? KILL_SECONDS : 0);
	if (!options->timeout || !job->started || job->reaped || job->killed || time < limit)
		return;
	kill(job->pid, job->timed_out ? SIGKILL : SIGTERM);
	kill(job->pid, SIGCONT);
	job->killed = job->timed_out;
	job->timed_out = 1;
}

static void divider(const struct options *options, const struct job *job)
{
	static const char dashes[] = "---------------------------------------------------------------------\n";
	char text[128];
	if (options->dividers)
		print_bytes(text, (size_t)snprintf(text, sizeof text, "%d\t%s", job->node, dashes));
}

/* -g: a block for every different output, headed by the nodes it came from. */
static void print_gathered(void)
{
	static const char line[] = "---------------\n";
	int *node = must_alloc(NULL, job_count * sizeof *node);
	for (size_t i = 0; i < job_count; i++) {
		const struct stream *first = &jobs[i].stream[0];
		size_t alike = 0;
		if (!jobs[i].done || !first->length)
			continue;
		for (size_t j = i; j < job_count; j++) {
			const struct stream *other = &jobs[j].stream[0];
			if (!jobs[j].done || other->length != first->length ||
			    memcmp(other->text, first->text, first->length))
				continue;
			node[alike++] = jobs[j].node;
			jobs[j].done = j == i; /* told */
		}
		char *spec = nodespec_fold(node, alike), count[32];
		print_bytes(line, sizeof line - 1);
		print_bytes(spec, strlen(spec));
		print_bytes(count, (size_t)snprintf(count, sizeof count, " (%zu)\n", alike));
		print_bytes(line, sizeof line - 1);
		print_bytes(first->text, first->length);
		if (first->text[first->length - 1] != '\n')
			print_bytes("\n", 1);
		free(spec);
	}
	free(node);
}

/* -- the loop ----------------------------------------------------------------------------------------------------- */

/* Waits for anything to do, and does it. `shown` is the job whose output may be read with -s; job_count: all of them. */
static void turn(const struct options *options, struct pollfd *ready, size_t shown)
{
	size_t count = 0;
	double soonest = -1;
	ready[count++] = (struct pollfd){.fd = wake[0], .events = POLLIN};
	ready[count++] = (struct pollfd){
		.fd = input.wanted && !input.ended && input_idle() ? 0 : -1, .events = POLLIN};
	for (size_t i = 0; i < job_count; i++) {
		struct job *job = &jobs[i];
		int visible = !options->sequential || i == shown;
		if (!job->started || job->done) {
			for (int j = 0; j < 3; j++)
				ready[count++].fd = -1;
			continue;
		}
		/* Without POLLOUT there is still POLLERR, which tells that the reader is gone. */
		ready[count++] = (struct pollfd){.fd = job->input, .events = job->sent < input.length ? POLLOUT : 0};
		for (int j = 0; j < 2; j++)
			ready[count++] = (struct pollfd){.fd = visible ? job->stream[j].fd : -1, .events = POLLIN};
		if (options->timeout && !job->reaped && !job->killed) {
			double limit = job->begin + options->timeout + (job->timed_out ? KILL_SECONDS : 0);
			if (soonest < 0 || limit < soonest)
				soonest = limit;
		}
	}
	double wait = soonest < 0 ? -1 : (soonest - now()) * 1000 + 1;
	if (poll(ready, count, soonest < 0 ? -1 : wait < 0 ? 0 : (int)wait) < 0)
		return; /* EINTR: the handler has left a byte */
	char drain[64];
	while (ready[0].revents && read(wake[0], drain, sizeof drain) > 0)
		;
	for (size_t i = 0; i < job_count; i++) {
		struct pollfd *at = ready + 2 + i * 3;
		if (at[0].fd >= 0 && at[0].revents & POLLERR)
			close_input(&jobs[i]);
		else if (at[0].fd >= 0 && at[0].revents)
			send_input(&jobs[i]);
		for (int j = 0; j < 2; j++)
			if (at[1 + j].fd >= 0 && at[1 + j].revents)
				stream_pump(&jobs[i].stream[j], options, jobs[i].node);
	}
	if (ready[1].fd >= 0 && ready[1].revents)
		read_input();
}

static size_t least(size_t a, size_t b)
{
	return a < b ? a : b;
}

/* Starts the next `count` commands, together where that can be. Returns how many. */
static size_t start_jobs(const struct options *options, struct job *first, size_t count)
{
	size_t together = 0, most = (size_t)batch_wanted(options, count), begun;
	for (begun = 0; begun < (most ? most : count) && !interrupts; begun++) {
		struct job *job = first + begun;
		job->waits = most && job->node != MASTER;
		together += start_job(options, job) == 0 && job->waits;
	}
	if (together)
		batch_send(options);
	return begun;
}

int run_many(const struct options *options, const int *node, size_t count)
{
	int worst = 0;
	size_t next = 0, running = 0, done = 0, shown = 0;
	jobs = must_alloc(NULL, count * sizeof *jobs);
	memset(jobs, 0, count * sizeof *jobs);
	for (size_t i = 0; i < count; i++) {
		jobs[i] = (struct job){.node = node[i], .rank = (int)i, .input = -1};
		jobs[i].stream[0] = (struct stream){.fd = -1, .out = 1, .keep = options->gather || options->json};
		jobs[i].stream[1] = (struct stream){.fd = -1, .out = 2, .keep = options->json};
	}
	job_count = count;
	apart = options->terminal;
	if (prepare_input(options) < 0)
		return 2;
	raise_file_limit(count);
	catch_signals();
	if (apart)
		terminal_take(count);
	struct pollfd *ready = must_alloc(NULL, (2 + count * 3) * sizeof *ready);
	if (options->sequential)
		divider(options, &jobs[0]);
	while (done < count) {
		size_t most = options->fanout ? least((size_t)options->fanout, count) - running : count;
		while (next < count && !interrupts && most && !batch_busy()) {
			size_t begun = start_jobs(options, &jobs[next], least(most, count - next));
			next += begun;
			running += begun;
			most -= begun;
		}
		if (interrupts && next < count) { /* what has not begun does not begin any more */
			count = job_count = next;
			continue;
		}
		reap();
		double time = now();
		for (size_t i = 0; i < next; i++) {
			struct job *job = &jobs[i];
			watch_time(options, job, time);
			if (job->reaped && job->timed_out)
				for (int j = 0; j < 2; j++)
					if (job->stream[j].fd >= 0) /* what it left in the background gets no hearing */
						stream_finish(&job->stream[j], options, job->node);
			if (job->done || !job->reaped || job->stream[0].fd >= 0 || job->stream[1].fd >= 0)
				continue;
			finish_job(options, job);
			int code = exit_code(options, job);
			worst = code > worst ? code : worst;
			running--;
			done++;
		}
		while (options->sequential && shown < count && jobs[shown].done)
			if (++shown < count)
				divider(options, &jobs[shown]);
		if (done < count && (next == count || batch_busy() || (options->fanout && running >= (size_t)options->fanout)))
			turn(options, ready, shown);
	}
	if (options->gather && !options->json)
		print_gathered();
	if (interrupts) {
		terminal_restore();
		signal(interrupt_signal, SIG_DFL);
		raise(interrupt_signal);
	}
	return output_failed && !worst ? EXIT_OUTPUT : worst;
}
