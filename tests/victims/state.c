/* Checks: ids, groups, capabilities, limits, umask, cwd, nice, comm, cmdline, environ, auxv, personality, interval and POSIX timers. */
#include "victim.h"
#include <grp.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/auxv.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <fcntl.h>

static volatile int ticks, timer_ticks, timer_value;
static void on_tick(int signal) { (void)signal, ticks++; }
static void on_timer(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	timer_ticks++;
	timer_value = info->si_value.sival_int;
}

static void snapshot(char *to, size_t size)
{
	static const char *files[] = {"/proc/self/cmdline", "/proc/self/environ", "/proc/self/comm", "/proc/self/auxv", "/proc/self/limits"};
	size_t at = 0;
	memset(to, 0, size);
	for (int i = 0; i < 5; i++) {
		int file = open(files[i], O_RDONLY);
		ssize_t got = file < 0 ? 0 : read(file, to + at, size - at);
		at += got > 0 ? (size_t)got : 0;
		close(file);
	}
	char link[512] = "", cwd[512] = "";
	uid_t uids[3];
	gid_t gids[3], groups[32];
	getresuid(uids, uids + 1, uids + 2);
	getresgid(gids, gids + 1, gids + 2);
	int count = getgroups(32, groups);
	CHECK(readlink("/proc/self/exe", link, sizeof link - 1) > 0 && getcwd(cwd, sizeof cwd));
	mode_t mask = umask(0);
	umask(mask);
	at += (size_t)snprintf(to + at, size - at, "|%s|%s|%u %u %u|%u %u %u|%d|%o|%d|%d|%d|%d|%lx|%d", link, cwd, uids[0], uids[1], uids[2], gids[0],
		gids[1], gids[2], count, mask, getpriority(PRIO_PROCESS, 0), prctl(PR_GET_DUMPABLE), prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0),
		(int)personality(0xffffffff), getauxval(AT_SYSINFO_EHDR), getpid());
	FILE *status = fopen("/proc/self/status", "r");
	char line[512];
	while (status && fgets(line, sizeof line, status))
		if (!strncmp(line, "Cap", 3) || !strncmp(line, "Groups", 6) || !strncmp(line, "Sig", 3)) {
			if (strncmp(line, "SigQ", 4) && strncmp(line, "SigPnd", 6))
				at += (size_t)snprintf(to + at, size - at, "%s", line);
		}
	if (status)
		fclose(status);
}

int main(int argc, char **argv)
{
	CHECK(argc > 2);
	umask(027);
	CHECK(!chdir("/usr"));
	setpriority(PRIO_PROCESS, 0, 5);
	prctl(PR_SET_NAME, "odd (name) x");
	personality(ADDR_NO_RANDOMIZE);
	struct rlimit limit = {100, 200};
	setrlimit(RLIMIT_NOFILE, &limit);
	signal(SIGALRM, on_tick);
	struct sigaction action = {.sa_sigaction = on_timer, .sa_flags = SA_SIGINFO};
	sigaction(SIGRTMIN + 2, &action, 0);
	timer_t gone, timer;
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 2, .sigev_value.sival_int = 4711};
	CHECK(!timer_create(CLOCK_MONOTONIC, &event, &gone) && !timer_create(CLOCK_MONOTONIC, &event, &timer));
	if (!strcmp(argv[2], "user")) {
		gid_t groups[] = {1000, 1001, 50};
		CHECK(!setgroups(3, groups) && !setresgid(1000, 1001, 1000) && !setresuid(1000, 1000, 1000));
		if (argc == 3)
			prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	}
	struct itimerval interval = {{0, 20000}, {0, 20000}};
	struct itimerspec setting = {{0, 20000000}, {0, 20000000}};
	CHECK(!setitimer(ITIMER_REAL, &interval, 0) && !timer_settime(timer, 0, &setting, 0));
	char *before = malloc(32768), *after = malloc(32768);
	snapshot(before, 32768);
	ready(argc, argv);
	while (!told_to_end())
		nap();
	snapshot(after, 32768);
	for (int i = 0; i < 32768; i++)
		if (before[i] != after[i]) {
			fprintf(stderr, "was: ...%.200s\nnow: ...%.200s\n", before + (i < 30 ? 0 : i - 30), after + (i < 30 ? 0 : i - 30));
			return 1;
		}
	int had = ticks, had_timer = timer_ticks;
	for (int i = 0; i < 2000 && (ticks < had + 2 || timer_ticks < had_timer + 2); i++)
		nap();
	CHECK(ticks >= had + 2);
	CHECK(timer_ticks >= had_timer + 2 && timer_value == 4711);
	struct itimerspec now_set;
	CHECK(!timer_gettime(timer, &now_set) && now_set.it_interval.tv_nsec == 20000000);
	CHECK(!timer_delete(timer));
	return 0;
}
