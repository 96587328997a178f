/* Checks what the kernel keeps of a process and shows nowhere: membarrier, core filter, securebits, machine checks, timers of all kinds,
 * signals that wait for one thread; and that nothing which waits for a time ever returns early. */
#include "victim.h"
#include <fcntl.h>
#include <linux/membarrier.h>
#include <linux/securebits.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/time.h>

#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#define PR_GET_MEMORY_MERGE 68
#endif

static int barrier(int command) { return (int)syscall(SYS_membarrier, command, 0, 0); }

static long core_filter(const char *set)
{
	char text[32] = "";
	int fd = open("/proc/self/coredump_filter", set ? O_WRONLY : O_RDONLY);
	CHECK(fd >= 0);
	if (set)
		CHECK(write(fd, set, strlen(set)) > 0);
	else
		CHECK(read(fd, text, sizeof text - 1) > 0);
	close(fd);
	return strtol(text, 0, 16);
}

static volatile int over, ticks, waits;
static volatile pid_t ticker;

static void on_tick(int signal) { (void)signal, ticks += syscall(SYS_gettid) == ticker; }

/* Sleeps to a moment, for a while, and for a turn that never comes: each returns late, if anything. */
static void *wait_for_times(void *unused)
{
	pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	pthread_cond_t never;
	pthread_condattr_t monotonic;
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&never, &monotonic);
	pthread_mutex_lock(&lock);
	while (!over) {
		struct timespec at, part = {0, 30000000};
		double start = now();
		while (nanosleep(&part, &part) && errno == EINTR)
			;
		CHECK(now() - start >= 0.03);
		for (int i = 0; i < 2; i++) {
			clock_gettime(CLOCK_MONOTONIC, &at);
			start = (double)at.tv_sec + (double)at.tv_nsec / 1e9;
			at.tv_nsec += 30000000;
			if (at.tv_nsec >= 1000000000)
				at.tv_nsec -= 1000000000, at.tv_sec++;
			if (i)
				CHECK(pthread_cond_timedwait(&never, &lock, &at) == ETIMEDOUT);
			else
				while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, 0) == EINTR)
					;
			CHECK(now() - start >= 0.0299);
		}
		waits++;
	}
	return unused;
}

/* Has a signal waiting for it alone, and another one that a timer sends to it alone. */
static void *wait_for_signals(void *unused)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	CHECK(!pthread_sigmask(SIG_BLOCK, &set, 0) && !pthread_kill(pthread_self(), SIGUSR1));
	ticker = (pid_t)syscall(SYS_gettid);
	while (!over)
		nap();
	siginfo_t info;
	struct timespec none = {0, 0};
	CHECK(syscall(SYS_rt_sigtimedwait, &set, &info, &none, 8) == SIGUSR1); /* libc's would say SI_USER */
	CHECK(info.si_code == SI_TKILL && info.si_pid == getpid());
	return unused;
}

static timer_t timer(int clock, int notify, double seconds, double interval)
{
	struct sigevent event = {.sigev_notify = notify, .sigev_signo = SIGRTMIN + 1, .sigev_value.sival_int = 17};
	event._sigev_un._tid = ticker;
	struct itimerspec setting = {{(time_t)interval, (long)(interval * 1e9) % 1000000000},
				     {(time_t)seconds, (long)(seconds * 1e9) % 1000000000}};
	timer_t made;
	CHECK(!timer_create(clock, &event, &made) && !timer_settime(made, 0, &setting, 0));
	return made;
}

static double left(timer_t one)
{
	struct itimerspec seen;
	CHECK(!timer_gettime(one, &seen));
	return (double)seen.it_value.tv_sec + (double)seen.it_value.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	int known = barrier(MEMBARRIER_CMD_QUERY), merge, bits = SECBIT_NO_SETUID_FIXUP | SECBIT_NO_SETUID_FIXUP_LOCKED;
	CHECK(known & MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE && known & MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ);
	CHECK(!barrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) && !barrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE));
	core_filter("0x11");
	CHECK(!prctl(PR_SET_SECUREBITS, bits) && !prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0));
	merge = !prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0); /* wants CAP_SYS_RESOURCE, and a kernel with KSM */
	struct sigaction action = {.sa_handler = on_tick, .sa_flags = SA_RESTART};
	sigaction(SIGRTMIN + 1, &action, 0);
	pthread_t times, signals;
	CHECK(!pthread_create(&signals, 0, wait_for_signals, 0));
	while (!ticker)
		nap();
	CHECK(!pthread_create(&times, 0, wait_for_times, 0));
	struct itimerval far = {{7, 0}, {1000, 0}}, seen;
	CHECK(!setitimer(ITIMER_VIRTUAL, &far, 0) && !setitimer(ITIMER_PROF, &far, 0));
	timer_t silent = timer(CLOCK_REALTIME, SIGEV_NONE, 1000, 3), cpu = timer(CLOCK_PROCESS_CPUTIME_ID, SIGEV_SIGNAL, 1000, 0);
	timer_t boot = timer(CLOCK_BOOTTIME, SIGEV_SIGNAL, 1000, 0);
	timer(CLOCK_MONOTONIC, SIGEV_THREAD_ID, 0.02, 0.02);
	ready(argc, argv);
	while (!told_to_end())
		nap();
	CHECK(!barrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED) && !barrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE));
	CHECK(barrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ) < 0 && errno == EPERM); /* nor more than it had asked for */
	CHECK(core_filter(0) == 0x11 && prctl(PR_GET_SECUREBITS) == bits && prctl(PR_MCE_KILL_GET, 0, 0, 0, 0) == PR_MCE_KILL_EARLY);
	CHECK(!merge || prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0) == 1);
	for (int which = ITIMER_VIRTUAL; which <= ITIMER_PROF; which++)
		CHECK(!getitimer(which, &seen) && seen.it_interval.tv_sec == 7 && seen.it_value.tv_sec > 900);
	CHECK(left(silent) > 900 && left(cpu) > 900 && left(boot) > 900 && left(silent) < 1000 && left(boot) < 1000);
	int had = ticks, had_waited = waits;
	for (int i = 0; i < 2000 && (ticks < had + 2 || waits < had_waited + 2); i++)
		nap();
	CHECK(ticks >= had + 2 && waits >= had_waited + 2);
	over = 1;
	CHECK(!pthread_join(times, 0) && !pthread_join(signals, 0));
	return 0;
}
