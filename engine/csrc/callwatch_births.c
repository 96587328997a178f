/* Forks of strict jobs: parent and child stand still, right after it, until the child has its ghost.
 * SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#include "callwatch_parts.h"
#include "inside.h"

#include <signal.h>
#include <sys/ptrace.h>
#include <sys/signalfd.h>
#include <sys/wait.h>

#define FORK_MS 100     /* within which a call that was let go on has forked, or has failed */
#define FORKS (PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE)

struct birth {
	struct birth *next;
	int parent, child; /* as we see them; child is 0 before the fork */
	uint32_t token;
	int64_t deadline;
	bool child_stands, over; /* over: the child is let go when it stands, too */
};

static struct birth *births;

/* Children whose parents' own stop has not been seen yet. */
#define EARLY 64
static int early[EARLY];

static void detach(int pid, int signal)
{
	ptrace(PTRACE_DETACH, pid, 0, signal);
}

static void forget_birth(struct birth *birth)
{
	struct birth **at = &births;

	while (*at != birth)
		at = &(*at)->next;
	*at = birth->next;
	free(birth);
}

static void let_go(struct birth *birth)
{
	if (!birth->over)
		detach(birth->parent, 0);
	birth->over = true;
	if (birth->child && !birth->child_stands)
		return;
	if (birth->child)
		detach(birth->child, 0);
	forget_birth(birth);
}

void begin_birth(const struct listener *from, const struct seccomp_notif *n)
{
	struct birth *birth = calloc(1, sizeof(*birth));
	int parent = (int)n->pid;

	/* Where the engine or a debugger has it, its ghost comes as that of any other. */
	if (!birth || ptrace(PTRACE_SEIZE, parent, 0, FORKS) < 0) {
		free(birth);
		answer(from, n->id, 0, true);
		return;
	}
	bool goes_on = answer(from, n->id, 0, true);
	*birth = (struct birth){ .next = births, .parent = parent, .deadline = now_ms() + (goes_on ? FORK_MS : 0) };
	births = birth;
}

static void has_forked(struct birth *birth)
{
	struct question question = { .kind = ASK_BORN, .token = new_token() };
	unsigned long child = 0;

	ptrace(PTRACE_GETEVENTMSG, birth->parent, 0, &child);
	birth->child = (int)child;
	for (int i = 0; i < EARLY; i++)
		if (early[i] == birth->child)
			birth->child_stands = true, early[i] = 0;
	birth->token = question.token;
	birth->deadline = now_ms() + ANSWER_MS;
	question.pid = inside_group(namespace_fd, birth->child);
	question.target = inside_group(namespace_fd, birth->parent);
	/* A thread, made by a call whose flags were changed under our eyes, has no ghost. */
	if (!question.pid || question.pid == question.target || !put(&question))
		let_go(birth);
}

static void child_stands(int pid)
{
	for (struct birth *birth = births; birth; birth = birth->next)
		if (birth->child == pid) {
			birth->child_stands = true;
			if (birth->over)
				let_go(birth);
			return;
		}
	for (int i = 0; i < EARLY; i++)
		if (!early[i]) {
			early[i] = pid;
			return;
		}
	detach(pid, 0);
}

static void has_ended(int pid)
{
	for (int i = 0; i < EARLY; i++)
		if (early[i] == pid)
			early[i] = 0;
	for (struct birth *birth = births; birth; birth = birth->next) {
		if (birth->parent == pid && !birth->child) {
			forget_birth(birth);
			return;
		}
		if (birth->parent == pid || birth->child == pid) {
			birth->over |= birth->parent == pid;
			birth->child_stands |= birth->child == pid; /* to detach it is an error that says nothing */
			let_go(birth);
			return;
		}
	}
}

static void has_stopped(int pid, int status)
{
	struct birth *birth = births;
	int event = status >> 16;

	while (birth && (birth->parent != pid || birth->over))
		birth = birth->next;
	if (!birth)
		child_stands(pid);
	else if (event == PTRACE_EVENT_FORK || event == PTRACE_EVENT_VFORK || event == PTRACE_EVENT_CLONE)
		has_forked(birth);
	else { /* a signal comes first, or it has failed */
		detach(pid, event ? 0 : WSTOPSIG(status));
		forget_birth(birth);
	}
}

void wait_for_tracees(int signals)
{
	struct signalfd_siginfo info;
	int status, pid;

	while (read(signals, &info, sizeof(info)) > 0)
		;
	while ((pid = waitpid(-1, &status, __WALL | WNOHANG)) > 0)
		if (WIFSTOPPED(status))
			has_stopped(pid, status);
		else
			has_ended(pid);
}

bool let_be_born(uint32_t token)
{
	for (struct birth *birth = births; birth; birth = birth->next)
		if (birth->token == token) {
			let_go(birth);
			return true;
		}
	return false;
}

void give_up_births(int64_t now)
{
	struct birth *birth, *next;

	for (birth = births; birth; birth = next) {
		next = birth->next;
		if (birth->deadline > now)
			continue;
		birth->deadline = now + ANSWER_MS;
		if (birth->child)
			let_go(birth);
		else
			ptrace(PTRACE_INTERRUPT, birth->parent, 0, 0); /* it has failed: nothing told us */
	}
}

int64_t births_deadline(void)
{
	int64_t next = INT64_MAX;

	for (struct birth *birth = births; birth; birth = birth->next)
		if (birth->deadline < next)
			next = birth->deadline;
	return next;
}
