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
#include "callwatch.h"
#include "inside.h"

#include <linux/sched.h>
#include <poll.h>
#include <pthread.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

#define PLACEHOLDER "nodeinit"
#define FORK_MS 100     /* within which a call that was let go on has forked, or has failed */
#define ANSWER_MS 5000  /* the master has not been heard of for so long: its node is about to be lost */
#define EVENTS 64
#define HASTE (-20)     /* nice(2) */
#define STACK (64 << 10)
#define WAKE SIGUSR2    /* to a thread whose listener is over, for kernels before 6.11 */
#define NOTIF_SET_FLAGS _IOW('!', 4, uint64_t) /* linux/seccomp.h, since 6.6: SECCOMP_IOCTL_NOTIF_SET_FLAGS */
#define SYNC_WAKE_UP 1
#define FORKS (PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE)

struct listener {
	struct listener *next;
	int fd;
	uint32_t number;
	pthread_t taker;
	struct seccomp_notif *slot;
};

struct taken { /* from a taker to the main thread */
	struct listener *from;
	int noted;
	struct seccomp_notif call; /* id 0: the listener is over */
};

struct call { /* a question to the daemon */
	struct call *next;
	struct listener *from;
	uint64_t id;
	uint32_t token;
	int64_t deadline;
	int noted;
};

struct birth {
	struct birth *next;
	int parent, child; /* as we see them; child is 0 before the fork */
	uint32_t token;
	int64_t deadline;
	bool child_stands, over; /* over: the child is let go when it stands, too */
};

static int daemon_fd, proc_fd = -1, namespace_fd = -1;
static int events_fd, inbox[2];
static struct listener *listeners;
static struct call *calls;
static struct birth *births;
static struct notes *notes;
static uint32_t tokens;

/* Children whose parents' own stop has not been seen yet. */
#define EARLY 64
static int early[EARLY];

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

/* ---- answers ---- */

static int take_note(const struct listener *from, uint64_t id)
{
	for (int i = 0; i < NOTES; i++) {
		uint64_t none = 0;

		if (__atomic_compare_exchange_n(&notes->calls[i].id, &none, id, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
			notes->calls[i].listener = from->number;
			return i;
		}
	}
	return -1;
}

static void drop_note(int index)
{
	if (index >= 0)
		__atomic_store_n(&notes->calls[index].id, 0, __ATOMIC_SEQ_CST);
}

/* False: the call is not waited for any more. */
static bool answer(int fd, uint64_t id, int error, bool native)
{
	struct seccomp_notif_resp response = {
		.id = id, .error = native ? 0 : -error, .flags = native ? SECCOMP_USER_NOTIF_FLAG_CONTINUE : 0,
	};

	return ioctl(fd, SECCOMP_IOCTL_NOTIF_SEND, &response) == 0;
}

/* ---- processes ---- */

static bool is_placeholder_name(const char *name)
{
	return !strncmp(name, PLACEHOLDER, sizeof(PLACEHOLDER) - 1);
}

static bool read_name(int folder, const char *path, char *name, size_t size)
{
	int fd = openat(folder, path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, name, size - 1);

	if (fd >= 0)
		close(fd);
	if (n <= 0)
		return false;
	name[n] = 0;
	return true;
}

/* Whether a process of this node, and not what stands for one elsewhere, has this number of the jobs'. */
static bool lives_here(int pid)
{
	char path[32], name[24];

	snprintf(path, sizeof(path), "%d/comm", pid);
	return read_name(proc_fd, path, name, sizeof(name)) && !is_placeholder_name(name);
}

static bool is_placeholder(int outer)
{
	char path[32], name[24];

	snprintf(path, sizeof(path), "/proc/%d/comm", outer);
	return read_name(AT_FDCWD, path, name, sizeof(name)) && is_placeholder_name(name);
}

static bool peek(int outer, uint64_t address, void *to, size_t size)
{
	struct iovec here = { to, size }, there = { (void *)(uintptr_t)address, size };

	return address && process_vm_readv(outer, &here, 1, &there, 1, 0) == (ssize_t)size;
}

/* Of a pidfd's process; 0: none of the jobs'. */
static int pid_of_pidfd(int outer, int fd)
{
	char path[64], text[1024];

	snprintf(path, sizeof(path), "%d/fdinfo/%d", inside(namespace_fd, outer), fd);
	if (!read_name(proc_fd, path, text, sizeof(text)))
		return 0;
	char *line = strstr(text, "\nPid:");
	int pid = line ? atoi(line + 5) : 0;
	return pid > 0 ? pid : 0;
}

/* ---- questions ---- */

static bool put(const struct question *question)
{
	return send(daemon_fd, question, sizeof(*question), MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof(*question);
}

static void ask(struct listener *from, const struct seccomp_notif *n, struct question question, int noted)
{
	struct call *call = calloc(1, sizeof(*call));

	question.token = ++tokens;
	question.pid = inside_group(namespace_fd, (int)n->pid);
	if (!call || !question.pid || !put(&question)) {
		free(call);
		answer(from->fd, n->id, 0, true);
		drop_note(noted);
		return;
	}
	*call = (struct call){ calls, from, n->id, question.token, now_ms() + ANSWER_MS, noted };
	calls = call;
}

/* ---- births ---- */

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

static void begin_birth(struct listener *from, const struct seccomp_notif *n)
{
	struct birth *birth = calloc(1, sizeof(*birth));
	int parent = (int)n->pid;

	/* Where the engine or a debugger has it, its ghost comes as that of any other. */
	if (!birth || ptrace(PTRACE_SEIZE, parent, 0, FORKS) < 0) {
		free(birth);
		answer(from->fd, n->id, 0, true);
		return;
	}
	bool goes_on = answer(from->fd, n->id, 0, true);
	*birth = (struct birth){ .next = births, .parent = parent, .deadline = now_ms() + (goes_on ? FORK_MS : 0) };
	births = birth;
}

static void has_forked(struct birth *birth)
{
	struct question question = { .kind = ASK_BORN, .token = ++tokens };
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

static void wait_for_tracees(int signals)
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

/* ---- calls ---- */

static bool forks(const struct seccomp_notif *n)
{
	uint64_t flags = 0;

	switch (n->data.nr) {
	case SYS_fork:
	case SYS_vfork:
	case SYS_clone: /* of no thread: the filter has seen to that */
		return true;
	case SYS_clone3:
		return peek((int)n->pid, n->data.args[0], &flags, sizeof(flags)) && !(flags & CLONE_THREAD);
	}
	return false;
}

/* What a call says of a signal; false: it is none, or none of ours. */
static bool read_signal(const struct seccomp_notif *n, struct question *q)
{
	const __u64 *a = n->data.args;
	uint64_t at = 0;
	siginfo_t info;

	switch (n->data.nr) {
	case SYS_kill:
		q->target = (int)a[0], q->signo = (int)a[1], q->code = SI_USER;
		return true;
	case SYS_tkill:
		q->target = (int)a[0], q->signo = (int)a[1], q->code = SI_TKILL;
		return q->target > 0;
	case SYS_tgkill: /* threads of processes elsewhere are not known here: their first one has the process's number */
		q->target = (int)a[1], q->signo = (int)a[2], q->code = SI_TKILL;
		return q->target > 0 && (int)a[0] == (int)a[1];
	case SYS_rt_sigqueueinfo:
		q->target = (int)a[0], q->signo = (int)a[1], at = a[2];
		break;
	case SYS_rt_tgsigqueueinfo:
		q->target = (int)a[1], q->signo = (int)a[2], at = a[3];
		if ((int)a[0] != (int)a[1])
			return false;
		break;
	case SYS_pidfd_send_signal:
		q->target = pid_of_pidfd((int)n->pid, (int)a[0]), q->signo = (int)a[1], at = a[2];
		q->code = SI_USER;
		if (!at || a[3])
			return q->target > 0 && !a[3];
		break;
	default:
		return false;
	}
	/* Only what a process may say of a signal to another: the rest is an error, which the kernel has to find. */
	if (q->target <= 0 || !peek((int)n->pid, at, &info, sizeof(info)) || info.si_code >= 0 || info.si_code == SI_TKILL)
		return false;
	q->code = SI_QUEUE;
	q->value = (uint64_t)(uintptr_t)info.si_value.sival_ptr;
	return true;
}

static void serve(struct listener *from, const struct seccomp_notif *n, int noted)
{
	struct question question = { .kind = ASK_SIGNAL };

	if (is_placeholder((int)n->pid)) {
		answer(from->fd, n->id, 0, true); /* a job that has left, and is stood for in its own process */
	} else if (forks(n)) {
		begin_birth(from, n);
	} else if (read_signal(n, &question) && (question.target <= 0 || !lives_here(question.target))) {
		ask(from, n, question, noted);
		return;
	} else {
		answer(from->fd, n->id, 0, true);
	}
	drop_note(noted);
}

static void drop_listener(struct listener *listener)
{
	struct question question = { .kind = TELL_OVER, .token = listener->number };
	struct listener **at = &listeners;
	struct call **call = &calls;

	while (*call)
		if ((*call)->from == listener) {
			struct call *gone = *call;
			drop_note(gone->noted);
			*call = gone->next;
			free(gone);
		} else {
			call = &(*call)->next;
		}
	pthread_join(listener->taker, NULL);
	while (*at != listener)
		at = &(*at)->next;
	*at = listener->next;
	epoll_ctl(events_fd, EPOLL_CTL_DEL, listener->fd, NULL); /* the daemon has it open as well */
	close(listener->fd);
	free(listener);
	put(&question);
}

static void hear_takers(void)
{
	struct taken taken;

	while (read(inbox[0], &taken, sizeof(taken)) == sizeof(taken))
		if (taken.call.id)
			serve(taken.from, &taken.call, taken.noted);
		else
			drop_listener(taken.from);
}

static void *take(void *of)
{
	static const struct taken none;
	struct taken taken = { .from = of };
	struct seccomp_notif *slot = taken.from->slot;

	for (;;) {
		struct pollfd state = { .fd = taken.from->fd };

		memset(slot, 0, SLOT_BYTES);
		if (ioctl(taken.from->fd, SECCOMP_IOCTL_NOTIF_RECV, slot) == 0) {
			taken.noted = take_note(taken.from, slot->id);
			taken.call = *slot;
		} else if (poll(&state, 1, 0) == 1 && state.revents & (POLLHUP | POLLERR | POLLNVAL)) {
			taken.call = none.call;
		} else {
			continue; /* it was interrupted, and is gone */
		}
		if (write(inbox[1], &taken, sizeof(taken)) != sizeof(taken))
			exit(1);
		if (!taken.call.id)
			return NULL;
	}
}

/* Nobody is under this listener any more: its taker shall say so, if it has not just done. */
static void wake_taker(const struct listener *of)
{
	for (struct listener *listener = listeners; listener; listener = listener->next)
		if (listener == of)
			pthread_kill(listener->taker, WAKE);
}

static void wake(int signo)
{
	(void)signo;
}

/* ---- the daemon ---- */

static void watch(int fd, uint32_t what, void *of)
{
	struct epoll_event event = { .events = what, .data.ptr = of };

	epoll_ctl(events_fd, EPOLL_CTL_ADD, fd, &event);
}

static void start_taker(struct listener *listener)
{
	pthread_attr_t attributes;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK);
	if (pthread_create(&listener->taker, &attributes, take, listener))
		exit(1);
}

static void listen_to(int fd, uint32_t number, int slot)
{
	struct listener *listener = calloc(1, sizeof(*listener));

	if (!listener)
		exit(1);
	*listener = (struct listener){ .next = listeners, .fd = fd, .number = number };
	listener->slot = (struct seccomp_notif *)notes->slots[slot];
	listeners = listener;
	/* Of a predecessor that died over them. */
	answer(fd, listener->slot->id, 0, true);
	for (int i = 0; i < NOTES; i++)
		if (notes->calls[i].id && notes->calls[i].listener == number) {
			answer(fd, notes->calls[i].id, 0, true);
			drop_note(i);
		}
	ioctl(fd, NOTIF_SET_FLAGS, SYNC_WAKE_UP); /* an older kernel's call waits some microseconds longer for us */
	watch(fd, EPOLLET, listener);
	start_taker(listener);
}

static void take_answer(const struct order *order)
{
	for (struct birth *birth = births; birth; birth = birth->next)
		if (birth->token == order->token) {
			let_go(birth);
			return;
		}
	for (struct call **at = &calls; *at; at = &(*at)->next)
		if ((*at)->token == order->token) {
			struct call *call = *at;
			answer(call->from->fd, call->id, order->error, order->native);
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
	notes = mmap(NULL, sizeof(*notes), PROT_READ | PROT_WRITE, MAP_SHARED, fds[2], 0);
	if (notes == MAP_FAILED)
		exit(1);
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
	int64_t now = now_ms(), next = INT64_MAX;

	for (struct birth *birth = births; birth; birth = birth->next)
		if (birth->deadline < next)
			next = birth->deadline;
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
	if (events_fd < 0 || pipe2(inbox, O_CLOEXEC) < 0)
		return 1;
	fcntl(inbox[0], F_SETFL, O_NONBLOCK);
	sigaction(WAKE, &(struct sigaction){ .sa_handler = wake }, NULL);
	watch(signals, EPOLLIN, &signals);
	watch(daemon_fd, EPOLLIN, &daemon_fd);
	watch(inbox[0], EPOLLIN, inbox);
	for (;;) {
		int count = epoll_wait(events_fd, events, EVENTS, wait_ms());

		for (int i = 0; i < count; i++) {
			if (events[i].data.ptr == &signals)
				wait_for_tracees(signals);
			else if (events[i].data.ptr == &daemon_fd)
				hear_daemon();
			else if (events[i].data.ptr == inbox)
				hear_takers();
			else
				wake_taker(events[i].data.ptr);
		}
		give_up(now_ms());
	}
}
