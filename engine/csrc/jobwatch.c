/* jobwatch - learns what the jobs of nodes on this machine fork, exec and become, and tells each node's daemon.
 *
 * usage: jobwatch FD      (a connected SEQPACKET socket, or one that listens: then a client a node)
 *
 * It hears the kernel's process connector, which speaks only to the initial pid and net namespaces; so it runs there,
 * outside of the nodes' own. Who descends from a job is a job: the fork's parent tells. The connector is listened to
 * only while some node has jobs, for every fork on the machine pays for each listener. What is too short-lived to be
 * worth a ghost is never reported: a process is told of when it is HOLD_MS old.
 *
 * What no event tells (setpgid, stops) is looked at four times a second, for jobs only. Where the connector does not
 * answer, or has lost events, the whole namespace is read at that pace.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#include "inside.h"
#include "jobwatch.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/cn_proc.h>
#include <linux/connector.h>
#include <linux/filter.h>
#include <linux/netlink.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PLACEHOLDER "nodeinit" /* its name; one that was ordered to stop has a longer one meanwhile */
#define HOLD_MS 5
#define LOOK_MS 250
#define LOOK_SHARE 50      /* looking, at the jobs of all nodes, takes at most one part in so many of a core */
#define IDLE_MS 2000       /* without a job for so long, a namespace is watched no more */
#define REAP_MS 2          /* between looks whether an ended process has been waited for; doubles each time */
#define REAP_MOST_MS 250
#define CLIENTS 2048
#define EVENTS 64 /* of one look at the epoll set */
#define BUCKETS 4096
#define RECEIVE_BUFFER (16 << 20)
#define INITIAL_PIDNS 0xEFFFFFFC /* linux/proc_ns.h: PROC_PID_INIT_INO */
#define PID_FROM_PIDNS 0x8004b706u /* linux/nsfs.h, since 6.11 */

struct client {
	int fd, proc, namespace;
	bool active;       /* events of its jobs are wanted */
	int64_t look_at;   /* next look at all its jobs */
	int64_t busy;      /* when it had jobs last, or was told that some come */
	char packet[PACKET_MAX];
	size_t filled;
};

struct job {
	struct job *next, **link;             /* in its bucket */
	struct job *later, *sooner;           /* all jobs of everybody */
	struct client *client;
	int global, pid, parent; /* parent: global, as far as it is known; else 0 */
	bool reported, ended, told_end, placeholder, seen;
	int code, first_code; /* wait status; that of the first thread, which may leave others behind */
	int64_t due;      /* when it is to be read or looked at; 0: not before the next look at all */
	int64_t backoff;
	uint64_t print;   /* of what was told last and no event tells: parent, group, session, state */
};

static struct client *clients[CLIENTS];
static int client_count;
static struct job *buckets[BUCKETS];
static struct job all = { .later = &all, .sooner = &all };
static int events = -1; /* the connector */
static int waiting = -1; /* the epoll set: of clients, the connector, and who listens for clients */
static bool answering;  /* it has said something: we are where it speaks */
static int64_t next_due = INT64_MAX;

static int64_t microseconds(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static int64_t now_ms(void)
{
	return microseconds(CLOCK_MONOTONIC) / 1000;
}

/* ---- jobs ---- */

static struct job *find(int global)
{
	struct job *job = buckets[global % BUCKETS];

	while (job && job->global != global)
		job = job->next;
	return job;
}

static void due(struct job *job, int64_t when)
{
	if (!job->due || when < job->due)
		job->due = when;
	if (job->due < next_due)
		next_due = job->due;
}

static struct job *add(struct client *client, int global, int pid, int parent)
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
	job->later = &all;
	job->sooner = all.sooner;
	all.sooner->later = job;
	all.sooner = job;
	return job;
}

static void forget(struct job *job)
{
	*job->link = job->next;
	if (job->next)
		job->next->link = job->link;
	job->later->sooner = job->sooner;
	job->sooner->later = job->later;
	free(job);
}

/* ---- pids ---- */

/* The job namespace's number of a process; 0 when it is gone. */
static int inner(const struct client *client, int global)
{
	return inside(client->namespace, global);
}

static int outer(const struct client *client, int pid)
{
	int global = ioctl(client->namespace, PID_FROM_PIDNS, pid);

	if (global >= 0 || errno == ESRCH)
		return global > 0 ? global : 0;
	return -1; /* an older kernel */
}

/* ---- records ---- */

static void flush_packet(struct client *client)
{
	if (client->filled)
		send(client->fd, client->packet, client->filled, MSG_NOSIGNAL);
	client->filled = 0;
}

static void put(struct client *client, struct record *record, const char *arguments)
{
	size_t size = (sizeof(*record) + record->arguments + 3) & ~3UL;

	if (client->filled + size > PACKET_MAX)
		flush_packet(client);
	record->size = (uint16_t)size;
	memset(client->packet + client->filled, 0, size);
	memcpy(client->packet + client->filled, record, sizeof(*record));
	memcpy(client->packet + client->filled + sizeof(*record), arguments, record->arguments);
	client->filled += size;
}

static ssize_t slurp(const struct job *job, const char *name, char *text, size_t size)
{
	char path[32];

	snprintf(path, sizeof(path), "%d/%s", job->pid, name);
	int fd = openat(job->client->proc, path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);
	if (fd >= 0)
		close(fd);
	text[n > 0 ? n : 0] = 0;
	return n;
}

struct stat_line {
	char comm[16], state;
	int ppid, pgid, sid, tty, threads, code;
};

static bool read_stat(const struct job *job, struct stat_line *s)
{
	char text[1024];
	long field[50] = { 0 };

	memset(s, 0, sizeof(*s));
	if (slurp(job, "stat", text, sizeof(text)) <= 0)
		return false;
	char *open_ = strchr(text, '('), *close_ = strrchr(text, ')');
	if (!open_ || !close_ || close_ - open_ > 64)
		return false;
	size_t length = close_ - open_ - 1;
	memcpy(s->comm, open_ + 1, length < 15 ? length : 15);
	s->state = close_[2];
	char *at = close_ + 3;
	for (int i = 0; i < 49; i++)
		field[i] = strtol(at, &at, 10);
	s->ppid = field[0];
	s->pgid = field[1];
	s->sid = field[2];
	s->tty = field[3];
	s->threads = field[16];
	s->code = field[48];
	return true;
}

static uint64_t print_of(const struct stat_line *s)
{
	uint64_t stopped = s->state == 'T';

	return ((uint64_t)s->ppid << 42) ^ ((uint64_t)s->pgid << 21) ^ (uint64_t)s->sid ^ stopped << 63;
}

static bool is_placeholder(const struct stat_line *s)
{
	return !strncmp(s->comm, PLACEHOLDER, sizeof(PLACEHOLDER) - 1);
}

static uint32_t id_of(const char *status, const char *key)
{
	const char *line = strstr(status, key);

	return line ? (uint32_t)strtoul(line + strlen(key), NULL, 10) : 0;
}

/* Tells how a process is now. */
static void tell(struct job *job, const struct stat_line *s)
{
	char status[4096], arguments[ARGUMENTS_MAX + 1];
	struct record r = {
		.kind = RECORD_IS, .state = s->state, .pid = job->pid, .ppid = s->ppid, .pgid = s->pgid, .sid = s->sid,
		.tty = s->tty,
	};

	if (slurp(job, "status", status, sizeof(status)) <= 0)
		return;
	r.uid = id_of(status, "\nUid:");
	r.gid = id_of(status, "\nGid:");
	memcpy(r.comm, s->comm, sizeof(r.comm));
	ssize_t n = slurp(job, "cmdline", arguments, sizeof(arguments));
	r.arguments = n > 0 ? (uint32_t)n : 0;
	put(job->client, &r, arguments);
	job->reported = true;
	job->print = print_of(s);
}

static void tell_end(struct job *job, enum record_kind kind)
{
	struct record r = { .kind = kind, .pid = job->pid, .code = job->code };

	if (kind == RECORD_ENDED) {
		if (job->told_end)
			return;
		job->told_end = true;
	}
	put(job->client, &r, "");
}

/* Whether nobody waits for it, nor for who it stands for, but nodeinit or a placeholder: what nobody asks for. */
static bool idle(const struct job *job)
{
	const struct job *parent = find(job->parent);

	/* Without a print it has not been looked at since it did something, and may be a job by now. */
	return parent && parent->client == job->client && (parent->pid == 1 || (parent->placeholder && parent->print));
}

/* Who it stands for shall hear of it. */
static void tell_stood(struct job *job, char state)
{
	struct record r = { .kind = RECORD_STOOD, .pid = job->pid, .state = state, .code = job->code };

	if (idle(job))
		return;
	if (state == 'Z' && job->code < 0 && outer(job->client, job->pid) > 0)
		return; /* noticed late, and followed by another already */
	put(job->client, &r, "");
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

	for (struct job *child = all.later; child != &all; child = child->later)
		if (child->parent == job->global && child->client == job->client)
			child->parent = init > 0 ? init : 0;
}

static void end(struct job *job, int code)
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
		tell_stood(job, 'Z');
	/* What nobody has heard of yet keeps the time at which it was to be told of. */
	if (job->reported || job->placeholder || !job->due)
		due(job, now_ms());
}

/* Its end was missed, and its number is another's now. */
static void lose(struct job *job)
{
	end(job, -1);
	if (job->reported || job->placeholder)
		tell_end(job, RECORD_REAPED);
	forget(job);
}

static void look(struct job *job, int64_t now, bool changed)
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
		end(job, -1);
		if (job->ended)
			look_for_reaper(job, now);
		return;
	}
	job->placeholder = is_placeholder(&s);
	if (s.state == 'Z' && s.threads <= 1 && !job->ended)
		end(job, s.code);
	if (job->placeholder) {
		job->reported = false; /* a job that has left, and is stood for; or it has always been one */
		if (s.state == 'T' && !s.comm[sizeof(PLACEHOLDER) - 1] && print_of(&s) != job->print)
			tell_stood(job, s.state);
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

static void touched(struct job *job)
{
	if (job->pid != 1 && !job->ended)
		due(job, now_ms() + HOLD_MS);
}

/* ---- looking at everything ---- */

static void scan(struct client *client, int64_t now)
{
	int fd = openat(client->proc, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *listing = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *entry;
	struct job *job, *next;

	if (!listing) {
		if (fd >= 0)
			close(fd);
		return;
	}
	for (job = all.later; job != &all; job = job->later)
		if (job->client == client)
			job->seen = false;
	while ((entry = readdir(listing))) {
		int pid = atoi(entry->d_name);
		int global = pid > 0 ? outer(client, pid) : 0;

		if (global <= 0)
			continue;
		job = find(global);
		if (job && (job->client != client || job->pid != pid)) {
			lose(job);
			job = NULL;
		}
		if (!job) {
			job = add(client, global, pid, 0);
			due(job, now);
		}
		job->seen = true;
	}
	closedir(listing);
	for (job = all.later; job != &all; job = next) {
		next = job->later;
		if (job->client == client && !job->seen && !job->ended)
			due(job, now);
	}
}

static int count_active(void)
{
	int count = 0;

	for (int i = 0; i < client_count; i++)
		count += clients[i]->active;
	return count;
}

static void look_at_all(struct client *client, int64_t now)
{
	int64_t began = microseconds(CLOCK_PROCESS_CPUTIME_ID);
	struct job *job, *next;
	bool busy = false;

	if (!answering)
		scan(client, now);
	for (job = all.later; job != &all; job = next) {
		next = job->later;
		if (job->client != client || job->pid == 1)
			continue;
		busy |= !job->placeholder;
		if (!job->ended && !job->due)
			look(job, now, false);
	}
	if (busy)
		client->busy = now;
	int64_t pause = (microseconds(CLOCK_PROCESS_CPUTIME_ID) - began) * LOOK_SHARE * count_active() / 1000;
	client->look_at = now + (pause > LOOK_MS ? pause : LOOK_MS);
}

/* ---- the connector ---- */

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

/* `what` is what its events come with. */
static void wait_for(int fd, void *what)
{
	struct epoll_event wanted = { .events = EPOLLIN, .data.ptr = what };

	if (epoll_ctl(waiting, EPOLL_CTL_ADD, fd, &wanted) < 0)
		exit(1);
}

static void listen_to_kernel(void)
{
	struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = CN_IDX_PROC };
	int size = RECEIVE_BUFFER;
	int fd = speaks_here() ? socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_CONNECTOR) : -1;

	if (fd < 0)
		return;
	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
	set_filter(fd);
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || !order(fd, PROC_CN_MCAST_LISTEN))
		close(fd);
	else
		wait_for(events = fd, &events);
}

static void stop_listening(void)
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
	end(job, code);
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

static void read_events(void)
{
	char data[1024];

	for (;;) {
		ssize_t n = recv(events, data, sizeof(data), 0);
		if (n < 0 && errno == ENOBUFS) {
			for (int i = 0; i < client_count; i++)
				if (clients[i]->active)
					scan(clients[i], now_ms());
			continue;
		}
		if (n < (ssize_t)(EVENT + DATA))
			return;
		one_event((const struct proc_event *)(data + EVENT));
	}
}

/* ---- clients ---- */

static void drop_jobs(struct client *client)
{
	struct job *job, *next;

	for (job = all.later; job != &all; job = next) {
		next = job->later;
		if (job->client == client)
			forget(job);
	}
}

static void drop_client(struct client *client)
{
	int index = 0;

	while (clients[index] != client)
		index++;
	drop_jobs(client);
	close(client->fd);
	if (client->proc >= 0)
		close(client->proc), close(client->namespace);
	free(client);
	clients[index] = clients[--client_count];
}

static void new_client(int fd)
{
	struct client *client = calloc(1, sizeof(*client));

	if (!client || client_count == CLIENTS) {
		close(fd);
		free(client);
		return;
	}
	client->fd = fd;
	client->proc = client->namespace = -1;
	clients[client_count++] = client;
	wait_for(fd, client);
}

static void activate(struct client *client, int64_t now)
{
	client->busy = now;
	client->active = true;
	client->look_at = now + LOOK_MS;
	if (events < 0)
		listen_to_kernel();
	/* After it has begun to listen: nothing is missed between. */
	scan(client, now);
}

static void look_at(struct client *client, int pid)
{
	struct job *job;

	for (job = all.later; job != &all; job = job->later)
		if (job->client == client && job->pid == pid && !job->ended)
			job->print = 0, due(job, now_ms() + 1);
}

/* False: it is gone. */
static bool hear(struct client *client)
{
	struct look look_ = { 0 };
	union {
		char space[CMSG_SPACE(2 * sizeof(int))];
		struct cmsghdr align;
	} ancillary;
	struct iovec v = { &look_, sizeof(look_) };
	struct msghdr h = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = &ancillary, .msg_controllen = sizeof(ancillary) };
	ssize_t n = recvmsg(client->fd, &h, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	if (n < 0)
		return errno == EAGAIN || errno == EINTR;
	if (n != sizeof(look_))
		return false;
	struct cmsghdr *c = CMSG_FIRSTHDR(&h);
	if (c && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(2 * sizeof(int)) && client->proc < 0) {
		int fds[2];
		memcpy(fds, CMSG_DATA(c), sizeof(fds));
		client->proc = fds[0];
		client->namespace = fds[1];
	}
	if (client->proc < 0)
		return false;
	if (!look_.pid)
		activate(client, now_ms());
	else
		look_at(client, look_.pid);
	return true;
}

/* ---- the loop ---- */

static void work(void)
{
	int64_t now = now_ms();
	bool active = false;

	if (next_due <= now) {
		struct job *job, *next;

		next_due = INT64_MAX;
		for (job = all.later; job != &all; job = next) {
			next = job->later;
			if (job->due && job->due <= now)
				look(job, now, !job->print);
			else if (job->due && job->due < next_due)
				next_due = job->due;
		}
	}
	for (int i = 0; i < client_count; i++) {
		struct client *client = clients[i];

		if (client->active && client->look_at <= now) {
			look_at_all(client, now);
			/* Only a look knows whether there are jobs, and the last one may have been long ago. */
			if (now - client->busy > IDLE_MS) {
				drop_jobs(client);
				client->active = false;
			}
		}
		active |= client->active;
		flush_packet(client);
	}
	if (!active && events >= 0)
		stop_listening();
}

static int wait_ms(void)
{
	int64_t now = now_ms(), next = next_due;

	for (int i = 0; i < client_count; i++)
		if (clients[i]->active && clients[i]->look_at < next)
			next = clients[i]->look_at;
	return next == INT64_MAX ? -1 : next <= now ? 0 : (int)(next - now);
}

static void accept_client(int listening)
{
	int fd = accept4(listening, NULL, NULL, SOCK_CLOEXEC);

	if (fd >= 0)
		new_client(fd);
}

int main(int argc, char **argv)
{
	struct epoll_event ready[EVENTS];
	int first = argc == 2 ? atoi(argv[1]) : -1, listening = 0;
	socklen_t size = sizeof(listening);

	if (first < 0 || getsockopt(first, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) < 0) {
		fputs("jobwatch: started by a node's daemon only\n", stderr);
		return 2;
	}
	fcntl(first, F_SETFD, FD_CLOEXEC);
	signal(SIGPIPE, SIG_IGN);
	waiting = epoll_create1(EPOLL_CLOEXEC);
	if (listening)
		wait_for(first, &listening);
	else
		new_client(first);
	while (listening || client_count) {
		int count = epoll_wait(waiting, ready, EVENTS, wait_ms());

		/* What the kernel has to say comes before what is looked at. */
		for (int i = 0; i < count; i++)
			if (ready[i].data.ptr == &events && events >= 0)
				read_events();
		for (int i = 0; i < count; i++) {
			void *what = ready[i].data.ptr;

			if (what == &listening)
				accept_client(first);
			else if (what != &events && !hear(what))
				drop_client(what);
		}
		work();
	}
	return 0;
}
