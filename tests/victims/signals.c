/* Checks: handlers with flags and masks, alternate stack, blocked and queued signals with their values and order, SIG_IGN. */
#include "victim.h"
#include <sys/wait.h>

static volatile int caught, on_altstack, values[8], count;
static char *alternate;

static void handler(int signal, siginfo_t *info, void *context)
{
	(void)context;
	char here;
	caught = signal;
	on_altstack = &here > alternate && &here < alternate + 65536;
	if (count < 8)
		values[count++] = info->si_value.sival_int;
}

/* 0x04000000: SA_RESTORER, which libc adds. */
int main(int argc, char **argv)
{
	alternate = malloc(65536);
	stack_t stack = {.ss_sp = alternate, .ss_size = 65536};
	CHECK(!sigaltstack(&stack, 0));
	struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
	sigaddset(&action.sa_mask, SIGHUP);
	CHECK(!sigaction(SIGRTMIN, &action, 0) && !sigaction(SIGUSR1, &action, 0) && !sigaction(SIGURG, &action, 0));
	if (argc > 2) /* nothing left that the engine could stop us with */
		CHECK(!sigaction(SIGWINCH, &action, 0) && !sigaction(SIGCHLD, &action, 0));
	signal(SIGUSR2, SIG_IGN);
	sigset_t blocked, old;
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGRTMIN), sigaddset(&blocked, SIGUSR1), sigaddset(&blocked, SIGTERM);
	CHECK(!sigprocmask(SIG_BLOCK, &blocked, 0));
	for (int i = 1; i <= 3; i++)
		CHECK(!sigqueue(getpid(), SIGRTMIN, (union sigval){.sival_int = i * 100}));
	raise(SIGUSR1);
	kill(getpid(), SIGTERM);
	ready(argc, argv);
	while (!told_to_end())
		nap();
	kill(getpid(), SIGUSR2);
	struct sigaction now;
	CHECK(!sigaction(SIGRTMIN, 0, &now) && now.sa_sigaction == handler && (now.sa_flags & ~0x04000000) == action.sa_flags);
	CHECK(sigismember(&now.sa_mask, SIGHUP) && !sigismember(&now.sa_mask, SIGINT));
	CHECK(!sigaction(SIGWINCH, 0, &now) && (argc > 2 ? now.sa_sigaction == handler : now.sa_handler == SIG_DFL));
	sigpending(&old);
	CHECK(sigismember(&old, SIGRTMIN) && sigismember(&old, SIGUSR1) && sigismember(&old, SIGTERM));
	sigemptyset(&old);
	sigaddset(&old, SIGTERM);
	siginfo_t info;
	CHECK(sigwaitinfo(&old, &info) == SIGTERM && info.si_pid == getpid() && info.si_code == SI_USER);
	sigemptyset(&old);
	sigaddset(&old, SIGUSR1);
	CHECK(sigwaitinfo(&old, &info) == SIGUSR1 && info.si_pid == getpid());
	sigprocmask(SIG_UNBLOCK, &blocked, &old);
	CHECK(sigismember(&old, SIGRTMIN) && sigismember(&old, SIGUSR1));
	CHECK(caught == SIGRTMIN && on_altstack && count == 3);
	CHECK(values[0] == 100 && values[1] == 200 && values[2] == 300);
	raise(SIGURG);
	CHECK(caught == SIGURG);
	return 0;
}
