/* A parent and its children, each wherever the test has put it, do to each other all that relatives may do.
 *
 * Lines on stdin: "fork N" makes N children and says their pids; "check" checks everything, and says "FAIL ..." for what is not
 * as on one machine, then "done". Parent and children talk by queued signals only, which have to find them. Our group is our own. */
#include "victim.h"
#include <sys/resource.h>
#include <sys/wait.h>

#define ASK (SIGRTMIN + 1)    /* value: a command */
#define ANSWER (SIGRTMIN + 2) /* value: its result */
#define MOST 4

enum command { PPID, PGRP, SID, SETPGID, SETSID, STOP, KILL_PARENT, HEARD_FROM, HEARD, EXIT, ABORT };

static pid_t children[MOST], self;
static int count;
static struct timespec patience = {20, 0}; /* seconds: what takes longer does not come */

#define EXPECT(what, got, wanted)                                                                                         \
	do {                                                                                                              \
		long got_ = (long)(got), wanted_ = (long)(wanted);                                                        \
		if (got_ != wanted_)                                                                                      \
			printf("FAIL child %d: %s: %ld, not %ld\n", which, what, got_, wanted_);                          \
	} while (0)

/* ---- a child ---- */

static long obey(int command, int heard, pid_t heard_from)
{
	switch (command) {
	case PPID: return getppid();
	case PGRP: return getpgrp();
	case SID: return getsid(0);
	case SETPGID: return setpgid(0, 0) ? errno : 0;
	case SETSID: return setsid();
	case STOP: return raise(SIGSTOP);
	case KILL_PARENT: return kill(getppid(), SIGUSR1) ? errno : 0;
	case HEARD_FROM: return heard_from;
	case HEARD: return heard;
	case ABORT: signal(SIGABRT, SIG_DFL); abort();
	}
	clock_t until = clock() + CLOCKS_PER_SEC / 10;
	while (clock() < until)
		;
	exit(7);
}

static void be_child(void)
{
	pid_t from = 0;
	int heard = 0;
	sigset_t set;
	siginfo_t info;

	/* With the parent's standard input its ghost would read what is meant for the parent. */
	for (int fd = 0; fd < 3; fd++)
		close(fd);
	sigemptyset(&set);
	sigaddset(&set, ASK);
	sigaddset(&set, SIGUSR2);
	for (;;) {
		if (sigwaitinfo(&set, &info) < 0)
			continue;
		if (info.si_signo == SIGUSR2) {
			heard++;
			from = info.si_pid;
			continue;
		}
		union sigval value = {.sival_int = (int)obey(info.si_value.sival_int, heard, from)};
		sigqueue(getppid(), ANSWER, value);
	}
}

/* ---- the parent ---- */

static int next(int signo, siginfo_t *info)
{
	sigset_t set;
	int got;

	sigemptyset(&set);
	sigaddset(&set, signo);
	while ((got = sigtimedwait(&set, info, &patience)) < 0 && errno == EINTR)
		;
	return got;
}

static void order(int which, int command)
{
	union sigval value = {.sival_int = command};
	EXPECT("sigqueue", sigqueue(children[which], ASK, value) ? errno : 0, 0);
}

static long answer(int which)
{
	siginfo_t info;
	EXPECT("an answer", next(ANSWER, &info), ANSWER);
	EXPECT("si_pid of sigqueue", info.si_pid, children[which]);
	return info.si_value.sival_int;
}

static long ask(int which, int command)
{
	order(which, command);
	return answer(which);
}

/* The SIGCHLD that tells of it. One that tells of the same twice is found by the next of these, or at the end. */
static void hear(int which, int code, int status)
{
	siginfo_t info = {0};
	EXPECT("SIGCHLD", next(SIGCHLD, &info), SIGCHLD);
	EXPECT("si_pid of SIGCHLD", info.si_pid, children[which]);
	EXPECT("si_code of SIGCHLD", info.si_code, code);
	EXPECT("si_status of SIGCHLD", info.si_status, status);
	EXPECT("si_uid of SIGCHLD", info.si_uid, getuid());
}

static pid_t eventually(pid_t (*get)(pid_t), pid_t of, pid_t wanted)
{
	double end = now() + (double)patience.tv_sec;
	while (get(of) != wanted && now() < end)
		nap();
	return get(of);
}

static void check_ids(int which)
{
	EXPECT("getppid", ask(which, PPID), self);
	EXPECT("getpgrp", ask(which, PGRP), getpgrp());
	EXPECT("getsid", ask(which, SID), getsid(0));
	EXPECT("the parent's getpgid", getpgid(children[which]), getpgrp());
}

static void check_stops(int which)
{
	pid_t child = children[which];
	siginfo_t info = {0};
	int status = 0;

	EXPECT("nothing to wait for", waitpid(child, &status, WNOHANG | WUNTRACED | WCONTINUED | __WALL), 0);
	kill(child, SIGSTOP);
	EXPECT("waitpid WUNTRACED", waitpid(child, &status, WUNTRACED), child);
	EXPECT("its status", status, W_STOPCODE(SIGSTOP));
	hear(which, CLD_STOPPED, SIGSTOP);
	EXPECT("the stop once only", waitpid(child, &status, WUNTRACED | WNOHANG), 0);
	kill(child, SIGCONT);
	EXPECT("waitid WCONTINUED", waitid(P_PID, child, &info, WCONTINUED) ? errno : 0, 0);
	EXPECT("its code", info.si_code, CLD_CONTINUED);
	hear(which, CLD_CONTINUED, SIGCONT);
	order(which, STOP);
	info = (siginfo_t){0};
	EXPECT("waitid P_PGID", waitid(P_PGID, getpgrp(), &info, WSTOPPED) ? errno : 0, 0);
	EXPECT("its pid", info.si_pid, child);
	EXPECT("its code", info.si_code, CLD_STOPPED);
	hear(which, CLD_STOPPED, SIGSTOP);
	kill(child, SIGCONT);
	EXPECT("waitpid WCONTINUED __WALL", waitpid(-1, &status, WCONTINUED | __WALL), child);
	EXPECT("WIFCONTINUED", WIFCONTINUED(status), 1);
	hear(which, CLD_CONTINUED, SIGCONT);
	EXPECT("it goes on", answer(which), 0);
}

static void check_signals(int which)
{
	siginfo_t info = {0};
	long before = ask(which, HEARD);

	EXPECT("the child's kill", ask(which, KILL_PARENT), 0);
	EXPECT("its signal", next(SIGUSR1, &info), SIGUSR1);
	EXPECT("its si_pid", info.si_pid, children[which]);
	EXPECT("kill", kill(children[which], SIGUSR2) ? errno : 0, 0);
	EXPECT("signals heard", ask(which, HEARD) - before, 1);
	EXPECT("si_pid of kill", ask(which, HEARD_FROM), self);
	EXPECT("kill of nothing", kill(children[which], 0) ? errno : 0, 0);
}

static void check_groups(int which)
{
	pid_t child = children[which];

	if (which % 2 == 0) {
		EXPECT("setpgid", ask(which, SETPGID), 0);
		EXPECT("its getpgrp", ask(which, PGRP), child);
		EXPECT("the parent's getpgid then", eventually(getpgid, child, child), child);
		EXPECT("waitpid of the new group", waitpid(-child, NULL, WNOHANG), 0);
	} else {
		EXPECT("setsid", ask(which, SETSID), child);
		EXPECT("its getsid", ask(which, SID), child);
		EXPECT("the parent's getsid", eventually(getsid, child, child), child);
	}
	EXPECT("its parent still", ask(which, PPID), self);
}

static void check_end(int which)
{
	pid_t child = children[which];
	struct rusage usage = {0};
	siginfo_t info = {0};
	int status = 0;

	int way = which % 3, signo = way == 1 ? SIGKILL : SIGABRT;
	if (way == 1)
		kill(child, SIGKILL);
	else
		order(which, way == 0 ? EXIT : ABORT);
	EXPECT("waitid WNOWAIT", waitid(P_PID, child, &info, WEXITED | WNOWAIT) ? errno : 0, 0);
	EXPECT("its status", info.si_status, way == 0 ? 7 : signo);
	EXPECT("wait4", wait4(child, &status, __WALL, &usage), child);
	EXPECT("its status", way == 0 ? WEXITSTATUS(status) : WTERMSIG(status), way == 0 ? 7 : signo);
	hear(which, way == 0 ? CLD_EXITED : info.si_code, way == 0 ? 7 : signo);
	EXPECT("ECHILD", waitpid(child, NULL, 0) < 0 ? errno : 0, ECHILD);
	EXPECT("ESRCH", kill(child, 0) ? errno : 0, ESRCH);
	if (way == 0)
		printf("used %ld\n", (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000 + usage.ru_utime.tv_usec +
		                              usage.ru_stime.tv_usec);
}

static void check(void)
{
	siginfo_t info;

	self = getpid();
	alarm(80); /* a wait that never ends */
	for (int i = 0; i < count; i++)
		check_ids(i);
	for (int i = 0; i < count; i++)
		check_stops(i);
	for (int i = 0; i < count; i++)
		check_signals(i);
	killpg(getpgrp(), SIGUSR2);
	for (int which = 0; which < count; which++) {
		long heard = 0;
		for (double end = now() + 20; (heard = ask(which, HEARD)) < 2 && now() < end;)
			nap();
		EXPECT("signals heard by killpg", heard, 2);
	}
	for (int i = 0; i < count; i++)
		check_groups(i);
	for (int i = 0; i < count; i++)
		check_end(i);
	int which = -1;
	EXPECT("ECHILD of all", waitpid(-1, NULL, 0) < 0 ? errno : 0, ECHILD);
	patience = (struct timespec){0, 0};
	EXPECT("no SIGCHLD too many", next(SIGCHLD, &info), -1);
	EXPECT("no signal too many", next(SIGUSR1, &info), -1);
	puts("done");
}

int main(void)
{
	char line[64];
	sigset_t set;

	setvbuf(stdout, NULL, _IOLBF, 0);
	sigemptyset(&set);
	int blocked[] = {ASK, ANSWER, SIGUSR1, SIGUSR2, SIGCHLD};
	for (unsigned i = 0; i < sizeof blocked / sizeof *blocked; i++)
		sigaddset(&set, blocked[i]);
	sigprocmask(SIG_BLOCK, &set, NULL);
	while (fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "fork %d", &count) == 1) {
			CHECK(count <= MOST);
			for (int i = 0; i < count; i++) {
				children[i] = fork();
				CHECK(children[i] >= 0);
				if (!children[i])
					be_child();
				printf("%d%c", children[i], i < count - 1 ? ' ' : '\n');
			}
		} else {
			check();
		}
	}
	return 0;
}
