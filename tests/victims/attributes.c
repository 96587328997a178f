/* Checks the smaller attributes: of the process (prctl, personality, priorities, OOM score) and of a second thread. */
#include "victim.h"
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#define IOPRIO_WHO_PROCESS 1
#define BEST_EFFORT_6 (2 << 13 | 6)
#define IDLE_CLASS (3 << 13)

struct seen {
	int policy, nice, io, affinity, slack;
};

static struct seen look(void)
{
	cpu_set_t cpus;
	CPU_ZERO(&cpus);
	CHECK(!sched_getaffinity(0, sizeof cpus, &cpus));
	return (struct seen){sched_getscheduler(0), getpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid)),
			     (int)syscall(SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0), CPU_COUNT(&cpus),
			     prctl(PR_GET_TIMERSLACK)};
}

static volatile int stop;

static void *work(void *unused)
{
	struct sched_param zero = {0};
	cpu_set_t one;
	CPU_ZERO(&one);
	CPU_SET(0, &one);
	CHECK(!sched_setscheduler(0, SCHED_IDLE, &zero) && !sched_setaffinity(0, sizeof one, &one));
	CHECK(!syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IDLE_CLASS));
	CHECK(!prctl(PR_SET_TIMERSLACK, 77777));
	struct seen before = look();
	while (!stop)
		nap();
	struct seen after = look();
	CHECK(before.policy == after.policy && before.affinity == after.affinity && after.affinity == 1);
	CHECK(before.io == after.io && before.slack == after.slack && after.slack == 77777);
	return unused;
}

static int oom_score(void)
{
	char text[16] = "";
	int fd = open("/proc/self/oom_score_adj", O_RDONLY);
	CHECK(fd >= 0 && read(fd, text, sizeof text - 1) > 0 && !close(fd));
	return atoi(text);
}

int main(int argc, char **argv)
{
	struct sched_param zero = {0};
	int fd = open("/proc/self/oom_score_adj", O_WRONLY), signal = 0, reaper = 0;
	CHECK(fd >= 0 && write(fd, "321", 3) == 3 && !close(fd));
	CHECK(!sched_setscheduler(0, SCHED_BATCH, &zero) && !setpriority(PRIO_PROCESS, 0, 7));
	CHECK(!syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, BEST_EFFORT_6));
	CHECK(!prctl(PR_SET_TIMERSLACK, 123456) && !prctl(PR_SET_PDEATHSIG, SIGUSR2) && !prctl(PR_SET_DUMPABLE, 0));
	CHECK(!prctl(PR_SET_KEEPCAPS, 1) && !prctl(PR_SET_CHILD_SUBREAPER, 1) && !prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
	CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) && personality(ADDR_COMPAT_LAYOUT) >= 0);
	struct seen before = look();
	pthread_t thread;
	CHECK(!pthread_create(&thread, NULL, work, NULL));
	ready(argc, argv);
	while (!told_to_end())
		nap();
	struct seen after = look();
	CHECK(after.policy == SCHED_BATCH && after.nice == 7 && after.io == BEST_EFFORT_6);
	CHECK(after.affinity == before.affinity && after.slack == 123456 && oom_score() == 321);
	CHECK(!prctl(PR_GET_PDEATHSIG, &signal) && signal == SIGUSR2 && !prctl(PR_GET_DUMPABLE));
	CHECK(prctl(PR_GET_KEEPCAPS) == 1 && !prctl(PR_GET_CHILD_SUBREAPER, &reaper) && reaper == 1);
	CHECK(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1 && prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1);
	CHECK(personality(0xffffffff) == ADDR_COMPAT_LAYOUT);
	stop = 1;
	CHECK(!pthread_join(thread, NULL));
	return 0;
}
