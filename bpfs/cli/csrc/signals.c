/* SPDX-License-Identifier: GPL-2.0-or-later
 * See signals.h. */
#define _GNU_SOURCE
#include "signals.h"
#include "batch.h"
#include "jobs.h"
#include "terminal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int wake[2];
volatile sig_atomic_t interrupts, interrupt_signal;
static struct sigaction old_pipe_action;
static sigset_t old_mask;

static void signal_jobs(int number)
{
	for (size_t i = 0; i < job_count; i++)
		if (jobs[i].pid > 0)
			kill(jobs[i].pid, number);
	if (template_job.pid > 0)
		kill(template_job.pid, number);
}

/* ^Z while the commands are apart: they stop and go on with us. */
static void on_stop(int number)
{
	int saved = errno;
	(void)number;
	signal_jobs(SIGSTOP);
	raise(SIGSTOP);
	signal_jobs(SIGCONT);
	errno = saved;
}

static void on_resize(int number)
{
	int saved = errno;
	(void)number;
	for (size_t i = 0; i < job_count; i++)
		if (jobs[i].stream[0].fd >= 0)
			terminal_resize(jobs[i].stream[0].fd);
	errno = saved;
}

static void on_signal(int number, siginfo_t *info, void *context)
{
	(void)context;
	int saved = errno;
	if (number != SIGCHLD) {
		interrupt_signal = number;
		/* The terminal has told the commands already where they are in our process group. */
		if (info->si_code != SI_KERNEL || apart)
			signal_jobs(number);
		if (++interrupts > 1) {
			signal_jobs(SIGKILL);
			terminal_restore();
			signal(number, SIG_DFL);
			raise(number); /* is let in when this handler returns */
		}
	}
	ssize_t ignored = write(wake[1], "", 1);
	(void)ignored;
	errno = saved;
}

void catch_signals(void)
{
	static const int number[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
	struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_NOCLDSTOP}, old;
	if (pipe2(wake, O_CLOEXEC | O_NONBLOCK) < 0) {
		complain("%s", strerror(errno));
		exit(EXIT_FAILED);
	}
	sigaction(SIGCHLD, &action, NULL);
	sigset_t child;
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigprocmask(SIG_UNBLOCK, &child, &old_mask); /* pdsh has its commands start with it blocked */
	for (size_t i = 0; i < sizeof number / sizeof *number; i++) {
		sigaction(number[i], NULL, &old);
		if (old.sa_handler != SIG_IGN) /* nohup, or a job in the background of a script */
			sigaction(number[i], &action, NULL);
	}
	if (apart) {
		struct sigaction stop = {.sa_handler = on_stop, .sa_flags = SA_RESTART};
		struct sigaction resize = {.sa_handler = on_resize, .sa_flags = SA_RESTART};
		sigaction(SIGTSTP, &stop, NULL);
		sigaction(SIGWINCH, &resize, NULL);
	}
	struct sigaction ignore = {.sa_handler = SIG_IGN};
	sigaction(SIGPIPE, &ignore, &old_pipe_action);
}

void forget_signals(void)
{
	static const int caught[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGCHLD, SIGTSTP, SIGWINCH};
	struct sigaction action;
	for (size_t i = 0; i < sizeof caught / sizeof *caught; i++)
		if (sigaction(caught[i], NULL, &action) == 0 && action.sa_handler != SIG_IGN)
			signal(caught[i], SIG_DFL);
	sigaction(SIGPIPE, &old_pipe_action, NULL);
	sigprocmask(SIG_SETMASK, &old_mask, NULL);
	close(wake[0]);
	close(wake[1]);
}
