/* Checks N threads: ids, TLS, names, masks, FP, alternate stacks, mutexes and condition variables that go on working. */
#include "victim.h"
#include <pthread.h>

#define MAX 512
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn = PTHREAD_COND_INITIALIZER;
static int next, count, over;
static long rounds[MAX];
static __thread int mine;
static __thread double pi_ish;

static void *work(void *argument)
{
	int index = (int)(intptr_t)argument;
	mine = index;
	pi_ish = index + 0.14159;
	char name[16];
	snprintf(name, sizeof name, "worker-%d", index);
	pthread_setname_np(pthread_self(), name);
	stack_t stack = {.ss_sp = malloc(32768), .ss_size = 32768}, seen;
	CHECK(!sigaltstack(&stack, 0));
	sigset_t mask, now_mask;
	sigemptyset(&mask);
	sigaddset(&mask, SIGRTMIN + index % 20);
	pthread_sigmask(SIG_SETMASK, &mask, 0);
	pid_t tid = (pid_t)syscall(SYS_gettid);
	double sum = 0;
	pthread_mutex_lock(&lock);
	while (!over) {
		while (next != index && !over)
			pthread_cond_wait(&turn, &lock);
		rounds[index]++;
		next = (index + 1) % count;
		pthread_cond_broadcast(&turn);
		pthread_mutex_unlock(&lock);
		for (int i = 0; i < 100; i++)
			sum += pi_ish;
		CHECK(mine == index && pi_ish == index + 0.14159 && (pid_t)syscall(SYS_gettid) == tid);
		nap();
		pthread_mutex_lock(&lock);
	}
	pthread_mutex_unlock(&lock);
	char got[16];
	pthread_getname_np(pthread_self(), got, sizeof got);
	CHECK(!strcmp(got, name));
	CHECK(!sigaltstack(0, &seen) && seen.ss_sp == stack.ss_sp);
	pthread_sigmask(0, 0, &now_mask);
	CHECK(sigismember(&now_mask, SIGRTMIN + index % 20) && !sigismember(&now_mask, SIGUSR1));
	return argument;
}

int main(int argc, char **argv)
{
	CHECK(argc > 2);
	count = atoi(argv[2]);
	pthread_t threads[MAX];
	for (int i = 0; i < count; i++)
		CHECK(!pthread_create(&threads[i], 0, work, (void *)(intptr_t)i));
	for (;;) {
		pthread_mutex_lock(&lock);
		int all = rounds[count - 1] > 0;
		pthread_mutex_unlock(&lock);
		if (all)
			break;
		nap();
	}
	ready(argc, argv);
	while (!told_to_end())
		nap();
	pthread_mutex_lock(&lock);
	long before = rounds[0];
	pthread_mutex_unlock(&lock);
	for (int i = 0; i < 100000; i++) { /* they go on taking turns */
		pthread_mutex_lock(&lock);
		long after = rounds[0];
		pthread_mutex_unlock(&lock);
		if (after > before + 1)
			break;
		CHECK(i < 99999);
		nap();
	}
	pthread_mutex_lock(&lock);
	over = 1;
	pthread_cond_broadcast(&turn);
	pthread_mutex_unlock(&lock);
	for (int i = 0; i < count; i++) {
		void *result;
		CHECK(!pthread_join(threads[i], &result) && (intptr_t)result == i);
	}
	return 0;
}
