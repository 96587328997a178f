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
#include "jobwatch_parts.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SETTLE_NS 1000000 /* from an event to reading it: a process that is born or ends makes several */
#define LOOK_MS 250
#define LOOK_SHARE 50      /* looking, at the jobs of all nodes, takes at most one part in so many of a core */
#define IDLE_MS 2000       /* without a job for so long, a namespace is watched no more */
#define CLIENTS 2048
#define EVENTS 64 /* of one look at the epoll set */

static struct client *clients[CLIENTS];
static int client_count;
static int waiting = -1; /* the epoll set: of clients, the connector, and who listens for clients */

/* ---- looking at everything ---- */

static int64_t spent_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

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
	for (job = jobs.later; job != &jobs; job = job->later)
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
	for (job = jobs.later; job != &jobs; job = next) {
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
	int64_t began = spent_us();
	struct job *job, *next;
	bool busy = false;

	if (!answering)
		scan(client, now);
	for (job = jobs.later; job != &jobs; job = next) {
		next = job->later;
		if (job->client != client || job->pid == 1)
			continue;
		busy |= !job->placeholder;
		if (!job->ended && !job->due)
			look(job, now, false);
	}
	if (busy)
		client->busy = now;
	int64_t pause = (spent_us() - began) * LOOK_SHARE * count_active() / 1000;
	client->look_at = now + (pause > LOOK_MS ? pause : LOOK_MS);
}

/* ---- clients ---- */

/* `what` is what its events come with. */
static void wait_for(int fd, void *what)
{
	struct epoll_event wanted = { .events = EPOLLIN, .data.ptr = what };

	if (epoll_ctl(waiting, EPOLL_CTL_ADD, fd, &wanted) < 0)
		exit(1);
}

static void drop_jobs(struct client *client)
{
	struct job *job, *next;

	for (job = jobs.later; job != &jobs; job = next) {
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
	if (events < 0 && listen_to_kernel())
		wait_for(events, &events);
	/* After it has begun to listen: nothing is missed between. */
	scan(client, now);
}

static void look_at(struct client *client, int pid)
{
	struct job *job;

	for (job = jobs.later; job != &jobs; job = job->later)
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

/* The kernel has dropped events. */
static void scan_again(void)
{
	for (int i = 0; i < client_count; i++)
		if (clients[i]->active)
			scan(clients[i], now_ms());
}

/* ---- the loop ---- */

static void work(void)
{
	int64_t now = now_ms();
	bool active = false;

	if (next_due <= now) {
		struct job *job, *next;

		next_due = INT64_MAX;
		for (job = jobs.later; job != &jobs; job = next) {
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

/* The events of one moment, of all nodes, in one go: being woken for each costs more than they do. */
static void let_events_gather(void)
{
	struct timespec pause = { .tv_nsec = SETTLE_NS };

	nanosleep(&pause, NULL);
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

		if (count == 1 && ready[0].data.ptr == &events)
			let_events_gather();
		/* What the kernel has to say comes before what is looked at. */
		for (int i = 0; i < count; i++)
			if (ready[i].data.ptr == &events && events >= 0 && !read_events())
				scan_again();
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
