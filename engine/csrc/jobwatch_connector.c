/* The kernel's process connector: what jobs fork, exec and how they end, as it happens.
 * SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#include "jobwatch_parts.h"

#include <errno.h>
#include <linux/cn_proc.h>
#include <linux/connector.h>
#include <linux/filter.h>
#include <linux/netlink.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define RECEIVE_BUFFER (16 << 20)
#define INITIAL_PIDNS 0xEFFFFFFC /* linux/proc_ns.h: PROC_PID_INIT_INO */

int events = -1;
bool answering;

static bool order(int fd, enum proc_cn_mcast_op op)
{
	struct __attribute__((packed)) {
		struct nlmsghdr head;
		struct cn_msg message;
		uint32_t op;
	} m = {
		.head = { .nlmsg_len = sizeof(m), .nlmsg_type = NLMSG_DONE, .nlmsg_pid = (uint32_t)getpid() },
		.message = { .id = { CN_IDX_PROC, CN_VAL_PROC }, .len = sizeof(uint32_t) },
		.op = op,
	};

	return send(fd, &m, sizeof(m), 0) == sizeof(m);
}

#define EVENT (sizeof(struct nlmsghdr) + sizeof(struct cn_msg))
#define WORD(n) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, EVENT + (n))
#define KIND(what, yes) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __builtin_bswap32(what), yes, 0)
#define DATA 16 /* what, cpu, time stamp */

/* Threads' own events, and kinds that nobody asks for, are not even queued. */
static void set_filter(int fd)
{
	struct sock_filter code[] = {
		WORD(0),
		KIND(PROC_EVENT_FORK, 7),
		KIND(PROC_EVENT_EXIT, 10),
		KIND(PROC_EVENT_EXEC, 9),
		KIND(PROC_EVENT_UID, 8),
		KIND(PROC_EVENT_GID, 7),
		KIND(PROC_EVENT_SID, 6),
		KIND(PROC_EVENT_COMM, 5),
		BPF_STMT(BPF_RET | BPF_K, 0),
		/* fork: parent pid, tgid, child pid, tgid */
		WORD(DATA + 8),
		BPF_STMT(BPF_MISC | BPF_TAX, 0),
		WORD(DATA + 12),
		BPF_JUMP(BPF_JMP | BPF_JA, 3, 0, 0),
		/* all others: pid, tgid */
		WORD(DATA),
		BPF_STMT(BPF_MISC | BPF_TAX, 0),
		WORD(DATA + 4),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_X, 0, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, 0xffffffff),
		BPF_STMT(BPF_RET | BPF_K, 0),
	};
	struct sock_fprog program = { sizeof(code) / sizeof(*code), code };

	setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program));
}

/* Elsewhere the kernel drops the order to tell, but not what it tells to others who listen, with numbers of theirs. */
static bool speaks_here(void)
{
	struct stat namespace;

	return stat("/proc/self/ns/pid", &namespace) == 0 && namespace.st_ino == INITIAL_PIDNS;
}

bool listen_to_kernel(void)
{
	struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = CN_IDX_PROC };
	int size = RECEIVE_BUFFER;
	int fd = speaks_here() ? socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_CONNECTOR) : -1;

	if (fd < 0)
		return false;
	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
	set_filter(fd);
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || !order(fd, PROC_CN_MCAST_LISTEN)) {
		close(fd);
		return false;
	}
	events = fd;
	return true;
}

void stop_listening(void)
{
	order(events, PROC_CN_MCAST_IGNORE);
	close(events);
	events = -1;
	answering = false;
}

static void forked(int parent, int child)
{
	struct job *from = find(parent), *job = find(child);

	if (job) {
		int now = inner(job->client, child);
		if (now == 0 || now == job->pid)
			return; /* a look at the namespace was faster than this event */
		lose(job);
	}
	if (!from)
		return;
	int pid = inner(from->client, child);
	if (pid <= 1)
		return;
	job = add(from->client, child, pid, parent);
	job->placeholder = from->placeholder; /* until it has been looked at */
	due(job, now_ms() + HOLD_MS);
}

static void ended(int global, int code)
{
	struct job *job = find(global);
	struct stat_line s;

	if (!job || job->pid == 1)
		return;
	if (read_stat(job, &s)) {
		if (s.threads > 1) {
			job->first_code = code;
			due(job, now_ms() + REAP_MS); /* mostly they all end */
			return;
		}
		if (!job->print) /* never looked at: whether it is one was a guess */
			job->placeholder = is_placeholder(&s);
	}
	finish(job, code);
}

static void touched(struct job *job)
{
	if (job->pid != 1 && !job->ended)
		due(job, now_ms() + HOLD_MS);
}

static void one_event(const struct proc_event *e)
{
	struct job *job;

	answering = true;
	switch (e->what) {
	case PROC_EVENT_FORK:
		forked(e->event_data.fork.parent_tgid, e->event_data.fork.child_tgid);
		break;
	case PROC_EVENT_EXIT:
		ended(e->event_data.exit.process_tgid, (int)e->event_data.exit.exit_code);
		break;
	default:
		job = find(e->event_data.exec.process_tgid);
		if (job)
			job->print = 0, touched(job);
	}
}

bool read_events(void)
{
	char data[1024];
	bool whole = true;

	for (;;) {
		ssize_t n = recv(events, data, sizeof(data), 0);
		if (n < 0 && errno == ENOBUFS)
			whole = false;
		else if (n < (ssize_t)(EVENT + DATA))
			return whole;
		else
			one_event((const struct proc_event *)(data + EVENT));
	}
}
