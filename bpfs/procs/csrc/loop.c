/* loop.c - buffers, the epoll loop and its ports. */
#define _GNU_SOURCE
#include "mux.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <fcntl.h>

#define EPOLL_PWAIT2 441 /* Linux 5.11 */
#define TURN_NS 100000   /* the least there is */

static int loop_fd = -1;
static struct stream *marked;

/* ---- buffers ---- */

uint8_t *buf_room(struct buf *b, size_t n)
{
	if (b->off && (!b->len || b->off + b->len + n > b->cap)) {
		memmove(b->data, b->data + b->off, b->len);
		b->off = 0;
	}
	if (b->len + n > b->cap) {
		size_t cap = b->cap ? b->cap : 512;

		while (cap < b->len + n)
			cap *= 2;
		b->data = realloc(b->data, cap);
		if (!b->data)
			_exit(255); /* every buffer is bounded: the machine is out of memory */
		b->cap = cap;
	}
	return b->data + b->off + b->len;
}

void buf_add(struct buf *b, const void *data, size_t n)
{
	memcpy(buf_room(b, n), data, n);
	b->len += n;
}

void buf_front(struct buf *b, const void *data, size_t n)
{
	struct buf old = *b;

	memset(b, 0, sizeof(*b));
	buf_add(b, data, n);
	if (old.len)
		buf_add(b, buf_head(&old), old.len);
	free(old.data);
}

void buf_drop(struct buf *b, size_t n)
{
	b->off += n;
	b->len -= n;
	if (!b->len)
		b->off = 0;
}

void buf_free(struct buf *b)
{
	free(b->data);
	memset(b, 0, sizeof(*b));
}

/* ---- ports ---- */

/* What a key typed waits for on a busy machine: since Linux 6.12 the scheduler lets who asks for short turns have them
 * soon. Older kernels do not mind. A process that comes home into its ghost gets its own back. */
static void ask_for_short_turns(void)
{
	struct {
		uint32_t size, policy;
		uint64_t flags;
		int32_t nice;
		uint32_t priority;
		uint64_t runtime, deadline, period;
	} a; /* struct sched_attr, version 0, of <linux/sched/types.h> */

	if (syscall(SYS_sched_getattr, 0, &a, sizeof(a), 0) < 0 || a.policy != SCHED_OTHER)
		return;
	a.runtime = TURN_NS;
	syscall(SYS_sched_setattr, 0, &a, 0);
}

void loop_init(void)
{
	int fd = epoll_create1(EPOLL_CLOEXEC);

	if (fd < 0)
		_exit(255);
	loop_fd = fcntl(fd, F_DUPFD_CLOEXEC, 200); /* low numbers belong to the job */
	if (loop_fd < 0)
		loop_fd = fd;
	else
		close(fd);
	ask_for_short_turns();
}

void loop_forget(void)
{
	marked = NULL;
}

void port_open(struct port *p, int fd, void (*call)(struct port *, uint32_t), void *owner)
{
	memset(p, 0, sizeof(*p));
	p->fd = fd;
	p->call = call;
	p->owner = owner;
}

void port_want(struct port *p, uint32_t events)
{
	struct epoll_event e = { .events = events, .data.ptr = p };

	if (p->fd < 0 || p->always || (p->listed && p->armed == events))
		return;
	if (epoll_ctl(loop_fd, p->listed ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, p->fd, &e) < 0) {
		p->always = errno == EPERM;
		return;
	}
	p->listed = true;
	p->armed = events;
}

void port_forget(struct port *p)
{
	if (p->fd >= 0 && p->listed)
		epoll_ctl(loop_fd, EPOLL_CTL_DEL, p->fd, NULL);
	p->listed = false;
	p->armed = 0;
}

void port_close(struct port *p)
{
	port_forget(p);
	if (p->fd >= 0)
		close(p->fd);
	p->fd = -1;
	p->ready = p->always = false;
}

/* ---- the loop ---- */

void stream_mark(struct stream *s)
{
	if (s->dirty || s->dead)
		return;
	s->dirty = true;
	s->next_dirty = marked;
	marked = s;
}

bool loop_once(int64_t timeout_us)
{
	struct epoll_event events[64];
	int64_t us = marked ? 0 : timeout_us;
	struct timespec wait = { .tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000 };
	int n = (int)syscall(EPOLL_PWAIT2, loop_fd, events, 64, us < 0 ? NULL : &wait, NULL, 8);
	bool interrupted = n < 0 && errno == EINTR;

	for (int i = 0; i < n; i++) {
		struct port *p = events[i].data.ptr;

		if (p->fd >= 0) /* not closed by an earlier one of this batch */
			p->call(p, events[i].events);
	}
	struct stream *s = marked, *next;
	marked = NULL;
	for (; s; s = next) {
		next = s->next_dirty;
		s->dirty = false;
		stream_service(s);
	}
	return interrupted;
}

int64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

int64_t now_ms(void)
{
	return now_us() / 1000;
}
