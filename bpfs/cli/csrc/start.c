/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * bpsh on several nodes: a command is started. */
#define _GNU_SOURCE
#include "batch.h"
#include "jobs.h"
#include "signals.h"
#include "terminal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

static struct rlimit old_files;

/* Three descriptors of ours for each node, on top of those we came with. */
void raise_file_limit(size_t count)
{
	getrlimit(RLIMIT_NOFILE, &old_files);
	struct rlimit raised = old_files;
	rlim_t needed = (rlim_t)count * 3 + 64;
	if (raised.rlim_cur >= needed)
		return;
	raised.rlim_cur = needed < raised.rlim_max ? needed : raised.rlim_max;
	setrlimit(RLIMIT_NOFILE, &raised);
}

void close_streams(struct job *job)
{
	close_input(job);
	for (int i = 0; i < 2; i++) {
		if (job->stream[i].fd >= 0)
			close(job->stream[i].fd);
		job->stream[i].fd = -1;
	}
}

/* A template leaves room for the longest of the ranks that the cluster puts there. */
static void __attribute__((noreturn)) turn_into_command(const struct options *options, const struct job *job)
{
	char rank[16];
	struct command command;
	snprintf(rank, sizeof rank, "%d", job == &template_job ? (int)job_count : job->rank);
	int failed = prepare_command(options, rank, &command);
	if (failed)
		_exit(failed);
	if (job == &template_job) {
		batch_wait_template();
		int code = run_command(&command);
		_exit(code);
	}
	if (job->waits)
		batch_wait(job);
	_exit(run_command_on(options, job->node, &command));
}

static void __attribute__((noreturn)) child(const struct options *options, struct job *job, int ends[3], pid_t parent)
{
	forget_signals();
	/* The exec would close them, but the cluster looks at us before it: a pipe with both ends here would have it
	 * search every process of the machine for a third one. */
	for (size_t i = 0; i < job_count; i++)
		close_streams(&jobs[i]);
	close_streams(&template_job);
	if (apart && terminal_enter(ends[1]) < 0)
		_exit(EXIT_FAILED);
	for (int fd = 0; fd < 3; fd++)
		if (ends[fd] >= 0 && dup2(ends[fd], fd) < 0)
			_exit(EXIT_FAILED);
	for (int fd = 0; fd < 3; fd++)
		if (ends[fd] > 2)
			close(ends[fd]);
	setrlimit(RLIMIT_NOFILE, &old_files);
	/* When bpsh is killed the commands hear what they would hear of a terminal that goes away. */
	prctl(PR_SET_PDEATHSIG, SIGHUP);
	if (getppid() != parent)
		_exit(EXIT_FAILED);
	turn_into_command(options, job);
}

/* Standard input of a command: a pipe of ours, or with --fanout its own view of the file that ours is. */
static int open_input(const struct options *options, int ends[2])
{
	ends[0] = ends[1] = -1;
	if (options->null[0] || options->file[0])
		return 0;
	if (input.wanted)
		return pipe2(ends, O_CLOEXEC);
	ends[0] = open("/proc/self/fd/0", O_RDONLY | O_CLOEXEC);
	if (ends[0] >= 0)
		lseek(ends[0], lseek(0, 0, SEEK_CUR), SEEK_SET);
	return ends[0] < 0 ? -1 : 0;
}

/* With -T one terminal is all of a command's standard descriptors that are not given otherwise; ours is read as its
 * standard output, and written to by another descriptor, which can be closed before the terminal hangs up. */
static int open_terminal(const struct options *options, int in[2], int out[2][2])
{
	if (terminal_open(out[0]) < 0)
		return -1;
	out[1][1] = fcntl(out[0][1], F_DUPFD_CLOEXEC, 3);
	if (!input.wanted)
		return open_input(options, in);
	in[0] = fcntl(out[0][1], F_DUPFD_CLOEXEC, 3);
	in[1] = fcntl(out[0][0], F_DUPFD_CLOEXEC, 3);
	return in[0] < 0 || in[1] < 0 || out[1][1] < 0 ? -1 : 0;
}

static int open_streams(const struct options *options, int in[2], int out[2][2])
{
	int failed = open_input(options, in);
	for (int i = 0; i < 2; i++)
		if (!options->null[i + 1] && !options->file[i + 1])
			failed |= pipe2(out[i], O_CLOEXEC);
	return failed;
}

/* Opens what connects us, and forks. Returns the pid, or -1. */
static pid_t start(const struct options *options, struct job *job)
{
	int in[2] = {-1, -1}, out[2][2] = {{-1, -1}, {-1, -1}};
	int failed = (apart ? open_terminal : open_streams)(options, in, out);
	job->input = in[1];
	job->stream[0].fd = out[0][0];
	job->stream[1].fd = out[1][0];
	pid_t parent = getpid();
	pid_t pid = failed ? -1 : fork();
	if (pid == 0)
		child(options, job, (int[]){in[0], out[0][1], out[1][1]}, parent);
	int why = errno;
	int theirs[] = {in[0], out[0][1], out[1][1]};
	for (int i = 0; i < 3; i++)
		if (theirs[i] >= 0)
			close(theirs[i]);
	if (pid < 0)
		close_streams(job);
	int ours[] = {job->input, job->stream[0].fd, job->stream[1].fd};
	for (int i = 0; i < 3; i++)
		if (ours[i] >= 0)
			fcntl(ours[i], F_SETFL, O_NONBLOCK); /* our end only: the other one is another description */
	errno = why;
	return pid;
}

int start_template(const struct options *options)
{
	pid_t pid = start(options, &template_job);
	template_job.pid = pid > 0 ? pid : 0;
	return pid > 0 ? 0 : -1;
}

int start_job(const struct options *options, struct job *job)
{
	pid_t pid = start(options, job);
	int why = errno;
	job->started = 1;
	job->begin = now();
	if (pid > 0) {
		job->pid = pid;
		return 0;
	}
	job->waits = 0;
	complain("node %d: %s", job->node, strerror(why));
	job->status = EXIT_FAILED << 8;
	job->reaped = 1;
	job->end = job->begin;
	return -1;
}
