/* forks - makes children in every way that Linux has, and says how each of them ended. */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile sig_atomic_t told;
static siginfo_t last;

static void on_child(int signo, siginfo_t *info, void *context)
{
	(void)signo;
	(void)context;
	last = *info;
	told++;
}

static void report(const char *how, pid_t child)
{
	int status = 0;
	pid_t got = waitpid(child, &status, __WALL);

	printf("%s: %s, status %x, SIGCHLD %d\n", how, got == child ? "waited" : "LOST", status,
	       told && last.si_pid == child);
}

static int in_clone(void *code)
{
	_exit(*(int *)code);
}

int main(void)
{
	struct sigaction action = { .sa_sigaction = on_child, .sa_flags = SA_SIGINFO | SA_RESTART };
	static char stack[65536];
	char *yes[] = { "true", NULL }, *no[] = { "false", NULL };
	extern char **environ;
	pid_t child, parent = getpid();
	siginfo_t info;
	int code = 11;

	setvbuf(stdout, NULL, _IOLBF, 0);
	sigaction(SIGCHLD, &action, NULL);
	if ((child = fork()) == 0)
		_exit(getppid() == parent && getpgrp() == getpgid(parent) && getsid(0) == getsid(parent) ? 3 : 99);
	report("fork", child);
	if ((child = vfork()) == 0)
		_exit(4);
	report("vfork", child);
	if (posix_spawnp(&child, "true", NULL, NULL, yes, environ))
		return 1;
	report("posix_spawn", child);
	if (posix_spawnp(&child, "false", NULL, NULL, no, environ))
		return 1;
	report("posix_spawn", child);
	child = clone(in_clone, stack + sizeof(stack), CLONE_VM | SIGCHLD, &code);
	report("clone", child);
	if ((child = fork()) == 0) {
		raise(SIGUSR2);
		_exit(0);
	}
	report("signal", child);
	if ((child = fork()) == 0) {
		setsid();
		_exit(getsid(0) == getpid() ? 5 : 99);
	}
	report("setsid", child);
	if ((child = fork()) == 0) {
		raise(SIGSTOP);
		_exit(6);
	}
	memset(&info, 0, sizeof(info));
	waitid(P_PID, child, &info, WSTOPPED);
	printf("stop: %d %d\n", info.si_code == CLD_STOPPED, info.si_status);
	kill(child, SIGCONT);
	memset(&info, 0, sizeof(info));
	waitid(P_PID, child, &info, WCONTINUED | WEXITED | WNOWAIT); /* it may have ended by now */
	printf("continue: %d\n", info.si_code == CLD_CONTINUED || info.si_code == CLD_EXITED);
	report("stopped", child);
	if ((child = fork()) == 0) {
		setpgid(0, 0);
		pause();
		_exit(0);
	}
	setpgid(child, child);
	killpg(child, SIGTERM);
	memset(&info, 0, sizeof(info));
	waitid(P_PGID, child, &info, WEXITED | WNOWAIT);
	printf("group: %d %d\n", info.si_code == CLD_KILLED, info.si_status);
	report("group", child);
	for (int i = 0; i < 50; i++)
		if (fork() == 0)
			_exit(i);
	int sum = 0, status, count = 0;
	while (wait(&status) > 0)
		sum += WEXITSTATUS(status), count++;
	printf("fifty: %d %d\n", count, sum);
	return 7;
}
