/* Checks one sleep of 1.5 s that is frozen and moved meanwhile: it returns what it should and lasts as long as it should.
 * argv[2] names the call. */
#include "victim.h"
#include <linux/futex.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/select.h>

static const struct timespec whole = {1, 500000000};

static long futex(int *word, int op, const struct timespec *timeout, unsigned bits)
{
	return syscall(SYS_futex, word, op, 0, timeout, 0, bits);
}

static int rest(const char *name)
{
	struct timespec left = whole, end;
	int word = 0, pipe_fds[2];
	CHECK(!pipe(pipe_fds));
	struct pollfd poll_fd = {pipe_fds[0], POLLIN, 0};
	sigset_t none, set;
	sigemptyset(&none);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, 0);
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += 1;
	end.tv_nsec += 500000000;
	if (end.tv_nsec >= 1000000000)
		end.tv_nsec -= 1000000000, end.tv_sec++;
	if (!strcmp(name, "nanosleep"))
		return syscall(SYS_nanosleep, &whole, &left) == 0;
	if (!strcmp(name, "nanosleep-norem"))
		return syscall(SYS_nanosleep, &whole, 0) == 0;
	if (!strcmp(name, "clock_nanosleep"))
		return clock_nanosleep(CLOCK_MONOTONIC, 0, &whole, &left) == 0;
	if (!strcmp(name, "clock_nanosleep-abs"))
		return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, 0) == 0;
	if (!strcmp(name, "poll"))
		return poll(&poll_fd, 1, 1500) == 0;
	if (!strcmp(name, "ppoll"))
		return ppoll(&poll_fd, 1, &whole, &none) == 0;
	if (!strcmp(name, "select")) {
		struct timeval time = {1, 500000};
		return select(0, 0, 0, 0, &time) == 0;
	}
	if (!strcmp(name, "pselect"))
		return pselect(0, 0, 0, 0, &whole, 0) == 0;
	if (!strcmp(name, "futex"))
		return futex(&word, FUTEX_WAIT_PRIVATE, &whole, 0) == -1 && errno == ETIMEDOUT;
	if (!strcmp(name, "futex-abs"))
		return futex(&word, FUTEX_WAIT_BITSET_PRIVATE, &end, ~0u) == -1 && errno == ETIMEDOUT;
	if (!strcmp(name, "epoll_wait")) {
		struct epoll_event event;
		return epoll_wait(epoll_create1(0), &event, 1, 1500) == 0;
	}
	if (!strcmp(name, "epoll_pwait2")) {
		struct epoll_event event;
		return syscall(SYS_epoll_pwait2, epoll_create1(0), &event, 1, &whole, 0, 0) == 0;
	}
	if (!strcmp(name, "sigtimedwait"))
		return sigtimedwait(&set, 0, &whole) == -1 && errno == EAGAIN;
	if (!strcmp(name, "read")) {
		char byte;
		alarm(2);
		return read(pipe_fds[0], &byte, 1) == -1 && errno == EINTR;
	}
	return 0;
}

static void on_alarm(int signal) { (void)signal; }

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = on_alarm};
	sigaction(SIGALRM, &action, 0);
	CHECK(argc > 2);
	ready(argc, argv);
	double start = now();
	CHECK(rest(argv[2]));
	double passed = now() - start;
	printf("%.4f\n", passed);
	/* Not cut short. (When poll went to sleep is known to a fraction of a millisecond, or worse where the host steals time.) */
	CHECK(passed >= 1.45);
	return 0;
}
