/* Takes calls, a thread for each listener, and answers them.
 * SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#include "callwatch_parts.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define STACK (64 << 10)
#define WAKE SIGUSR2    /* to a thread whose listener is over, for kernels before 6.11 */
#define NOTIF_SET_FLAGS _IOW('!', 4, uint64_t) /* linux/seccomp.h, since 6.6: SECCOMP_IOCTL_NOTIF_SET_FLAGS */
#define SYNC_WAKE_UP 1

struct listener {
	struct listener *next;
	int fd;
	uint32_t number;
	pthread_t taker;
	struct seccomp_notif *slot;
};

static int inbox[2];
static struct listener *listeners;
static struct notes *notes;

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

void drop_note(int index)
{
	if (index >= 0)
		__atomic_store_n(&notes->calls[index].id, 0, __ATOMIC_SEQ_CST);
}

bool answer(const struct listener *from, uint64_t id, int error, bool native)
{
	struct seccomp_notif_resp response = {
		.id = id, .error = native ? 0 : -error, .flags = native ? SECCOMP_USER_NOTIF_FLAG_CONTINUE : 0,
	};

	return ioctl(from->fd, SECCOMP_IOCTL_NOTIF_SEND, &response) == 0;
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

void wake_taker(const void *of)
{
	for (struct listener *listener = listeners; listener; listener = listener->next)
		if (listener == of)
			pthread_kill(listener->taker, WAKE);
}

static void wake(int signo)
{
	(void)signo;
}

static void start_taker(struct listener *listener)
{
	pthread_attr_t attributes;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK);
	if (pthread_create(&listener->taker, &attributes, take, listener))
		exit(1);
}

void listen_to(int fd, uint32_t number, int slot)
{
	struct listener *listener = calloc(1, sizeof(*listener));

	if (!listener)
		exit(1);
	*listener = (struct listener){ .next = listeners, .fd = fd, .number = number };
	listener->slot = (struct seccomp_notif *)notes->slots[slot];
	listeners = listener;
	/* Of a predecessor that died over them. */
	answer(listener, listener->slot->id, 0, true);
	for (int i = 0; i < NOTES; i++)
		if (notes->calls[i].id && notes->calls[i].listener == number) {
			answer(listener, notes->calls[i].id, 0, true);
			drop_note(i);
		}
	ioctl(fd, NOTIF_SET_FLAGS, SYNC_WAKE_UP); /* an older kernel's call waits some microseconds longer for us */
	watch(fd, EPOLLET, listener);
	start_taker(listener);
}

void drop_listener(struct listener *listener)
{
	struct question question = { .kind = TELL_OVER, .token = listener->number };
	struct listener **at = &listeners;

	pthread_join(listener->taker, NULL);
	while (*at != listener)
		at = &(*at)->next;
	*at = listener->next;
	unwatch(listener->fd); /* the daemon has it open as well */
	close(listener->fd);
	free(listener);
	put(&question);
}

bool next_taken(struct taken *taken)
{
	return read(inbox[0], taken, sizeof(*taken)) == sizeof(*taken);
}

void take_notes(int fd)
{
	notes = mmap(NULL, sizeof(*notes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (notes == MAP_FAILED)
		exit(1);
}

int start_taking(void)
{
	if (pipe2(inbox, O_CLOEXEC) < 0)
		return -1;
	fcntl(inbox[0], F_SETFL, O_NONBLOCK);
	sigaction(WAKE, &(struct sigaction){ .sa_handler = wake }, NULL);
	return inbox[0];
}
