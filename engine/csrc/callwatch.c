/* callwatch - answers the system calls of strict jobs that the kernel hands over (seccomp_unotify(2)).
 *
 * usage: callwatch FD      (a connected SEQPACKET socket of the node's daemon)
 *
 * The filter (engine/strict.py) hands over what sends a signal, and forks. What concerns processes
 * of this node only, the kernel goes on with at once. All else is asked of the daemon, which asks the master. A fork is
 * let through under a tracer: parent and child stand still, right after it, until the child has its ghost. Nobody has
 * to wait for ever: a question without an answer is over after a while, and the kernel makes the call.
 *
 * Until a call has been taken, a signal interrupts it, and fork(2) is not made for EINTR. So a thread for each listener
 * does nothing but take calls, woken on the caller's own processor, and the main thread, the tracer, does the rest.
 *
 * The daemon holds every listener as well. Should this process die, its successor lets the kernel make the calls that
 * were being answered (struct notes), and goes on with those that wait.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#include "callwatch_parts.h"
#include "inside.h"

#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <time.h>

#define EVENTS 64
#define HASTE (-20)     /* nice(2) */

struct call { /* a question to the daemon */
	struct call *next;
	struct listener *from;
	uint64_t id;
	uint32_t token;
	int64_t deadline;
	int noted;
};

int proc_fd = -1, namespace_fd = -1;
static int daemon_fd, events_fd;
static struct call *calls;

int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

void watch(int fd, uint32_t what, void *of)
{
	struct epoll_event event = { .events = what, .data.ptr = of };

	epoll_ctl(events_fd, EPOLL_CTL_ADD, fd, &event);
}

void unwatch(int fd)
{
	epoll_ctl(events_fd, EPOLL_CTL_DEL, fd, NULL);
}

/* ---- questions ---- */

bool put(const struct question *question)
{
	return send(daemon_fd, question, sizeof(*question), MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof(*question);
}

uint32_t new_token(void)
{
	static uint32_t last;

	return ++last;
}

static void ask(struct listener *from, const struct seccomp_notif *n, struct question question, int noted)
{
	struct call *call = calloc(1, sizeof(*call));

	question.token = new_token();
	question.pid = inside_group(namespace_fd, (int)n->pid);
	if (!call || !question.pid || !put(&question)) {
		free(call);
		answer(from, n->id, 0, true);
		drop_note(noted);
		return;
	}
	*call = (struct call){ calls, from, n->id, question.token, now_ms() + ANSWER_MS, noted };
	calls = call;
}

/* ---- calls ---- */

static void serve(struct listener *from, const struct seccomp_notif *n, int noted)
{
	struct question question = { .kind = ASK_SIGNAL };

	if (is_placeholder((int)n->pid)) {
		answer(from, n->id, 0, true); /* a job that has left, and is stood for in its own process */
	} else if (forks(n)) {
		begin_birth(from, n);
	} else if (read_signal(n, &question) && (question.target <= 0 || !lives_here(question.target))) {
		ask(from, n, question, noted);
		return;
	} else {
		answer(from, n->id, 0, true);
	}
	drop_note(noted);
}

/* Nobody waits any more for what was asked for it. */
static void forget_calls(const struct listener *from)
{
	struct call **call = &calls;

	while (*call)
		if ((*call)->from == from) {
			struct call *gone = *call;
			drop_note(gone->noted);
			*call = gone->next;
			free(gone);
		} else {
			call = &(*call)->next;
		}
}

static void hear_takers(void)
{
	struct taken taken;

	while (next_taken(&taken))
		if (taken.call.id) {
			serve(taken.from, &taken.call, taken.noted);
		} else {
			forget_calls(taken.from);
			drop_listener(taken.from);
		}
}

/* ---- the daemon ---- */

static void take_answer(const struct order *order)
{
	if (let_be_born(order->token))
		return;
	for (struct call **at = &calls; *at; at = &(*at)->next)
		if ((*at)->token == order->token) {
			struct call *call = *at;
			answer(call->from, call->id, order->error, order->native);
			drop_note(call->noted);
			*at = call->next;
			free(call);
			return;
		}
}

static void take_space(const int *fds)
{
	proc_fd = fds[0];
	namespace_fd = fds[1];
	take_notes(fds[2]);
	close(fds[2]);
}

static void hear_daemon(void)
{
	struct order order = { 0 };
	union {
		char space[CMSG_SPACE(3 * sizeof(int))];
		struct cmsghdr align;
	} ancillary;
	struct iovec v = { &order, sizeof(order) };
	struct msghdr h = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = &ancillary, .msg_controllen = sizeof(ancillary) };
	ssize_t n = recvmsg(daemon_fd, &h, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	int fds[3] = { -1, -1, -1 };

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n != sizeof(order))
		exit(0);
	struct cmsghdr *c = CMSG_FIRSTHDR(&h);
	if (c && c->cmsg_type == SCM_RIGHTS)
		memcpy(fds, CMSG_DATA(c), c->cmsg_len - CMSG_LEN(0));
	if (order.kind == ORDER_SPACE)
		take_space(fds);
	else if (order.kind == ORDER_LISTEN)
		listen_to(fds[0], order.token, order.error);
	else
		take_answer(&order);
}

/* ---- the loop ---- */

static void give_up(int64_t now)
{
	give_up_births(now);
	for (struct call **at = &calls; *at;)
		if ((*at)->deadline <= now) {
			struct order native = { .token = (*at)->token, .native = 1 };
			take_answer(&native);
			at = &calls;
		} else {
			at = &(*at)->next;
		}
}

static int wait_ms(void)
{
	int64_t now = now_ms(), next = births_deadline();

	for (struct call *call = calls; call; call = call->next)
		if (call->deadline < next)
			next = call->deadline;
	return next == INT64_MAX ? -1 : next <= now ? 0 : (int)(next - now);
}

int main(int argc, char **argv)
{
	struct epoll_event events[EVENTS];
	socklen_t size = sizeof(int);
	int type = 0;
	sigset_t ends;

	daemon_fd = argc == 2 ? atoi(argv[1]) : -1;
	if (daemon_fd < 3 || getsockopt(daemon_fd, SOL_SOCKET, SO_TYPE, &type, &size) < 0 || type != SOCK_SEQPACKET) {
		fputs("callwatch: started by a node's daemon only\n", stderr);
		return 2;
	}
	fcntl(daemon_fd, F_SETFD, FD_CLOEXEC);
	prctl(PR_SET_NAME, "bpfs-callwatch"); /* the engine waits for tracers of ours (engine/freeze.py) */
	setpriority(PRIO_PROCESS, 0, HASTE);
	sigemptyset(&ends);
	sigaddset(&ends, SIGCHLD);
	sigprocmask(SIG_BLOCK, &ends, NULL);
	int signals = signalfd(-1, &ends, SFD_NONBLOCK | SFD_CLOEXEC);
	events_fd = epoll_create1(EPOLL_CLOEXEC);
	int inbox = start_taking();
	if (events_fd < 0 || inbox < 0)
		return 1;
	watch(signals, EPOLLIN, &signals);
	watch(daemon_fd, EPOLLIN, &daemon_fd);
	watch(inbox, EPOLLIN, &inbox);
	for (;;) {
		int count = epoll_wait(events_fd, events, EVENTS, wait_ms());

		for (int i = 0; i < count; i++) {
			if (events[i].data.ptr == &signals)
				wait_for_tracees(signals);
			else if (events[i].data.ptr == &daemon_fd)
				hear_daemon();
			else if (events[i].data.ptr == &inbox)
				hear_takers();
			else
				wake_taker(events[i].data.ptr);
		}
		give_up(now_ms());
	}
}
