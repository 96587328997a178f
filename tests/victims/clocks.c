/* Checks: every vDSO call goes on working and agrees with its system call, from main, a thread and a signal handler. */
#include "victim.h"
#include <pthread.h>
#include <sys/time.h>
#include <sched.h>

static long long ns(struct timespec t) { return t.tv_sec * 1000000000LL + t.tv_nsec; }

static long long asked(int clock)
{
	struct timespec t;
	CHECK(!syscall(SYS_clock_gettime, clock, &t));
	return ns(t);
}

static long long told(int clock)
{
	struct timespec t;
	CHECK(!clock_gettime(clock, &t));
	return ns(t);
}

/* Between two system calls; the coarse clocks step by a tick (10 ms at most). */
static void agree(int clock, long long slack)
{
	long long before = asked(clock), between = told(clock), after = asked(clock);
	if (before <= after)
		CHECK(between >= before - slack && between <= after + slack);
}

static void check_all(void)
{
	agree(CLOCK_MONOTONIC, 0);
	agree(CLOCK_REALTIME, 0);
	agree(CLOCK_BOOTTIME, 0);
	agree(CLOCK_MONOTONIC_RAW, 0);
	agree(CLOCK_REALTIME_COARSE, 20000000);
	agree(CLOCK_MONOTONIC_COARSE, 20000000);
	struct timespec known, now;
	CHECK(!clock_getres(CLOCK_MONOTONIC, &known) && !syscall(SYS_clock_getres, CLOCK_MONOTONIC, &now));
	CHECK(ns(known) == ns(now));
	struct timeval day;
	CHECK(!gettimeofday(&day, NULL));
	long long gap = time(NULL) - (long long)day.tv_sec;
	CHECK(gap >= -1 && gap <= 1);
	CHECK(sched_getcpu() >= 0);
}

static volatile sig_atomic_t handled;
static void on_alarm(int signal)
{
	(void)signal;
	check_all();
	handled++;
}

static void *work(void *stop)
{
	long long last = 0;
	while (!*(volatile int *)stop) {
		long long now = told(CLOCK_MONOTONIC);
		CHECK(now >= last);
		last = now;
		check_all();
	}
	return NULL;
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
	sigaction(SIGALRM, &action, NULL);
	struct itimerval every = {{0, 3000}, {0, 3000}};
	setitimer(ITIMER_REAL, &every, NULL);
	int stop = 0;
	pthread_t thread;
	pthread_create(&thread, NULL, work, &stop);
	ready(argc, argv);
	while (!told_to_end())
		for (int i = 0; i < 1000; i++)
			check_all();
	int before = handled;
	while (handled == before)
		told(CLOCK_MONOTONIC);
	stop = 1;
	pthread_join(thread, NULL);
	return 0;
}
