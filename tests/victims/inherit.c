/* Checks priority inheritance: mutexes that are held with and without waiters (one has a limit of time), a condition variable of one, one
 * that several threads fight for, and a robust one whose owner ends after the move. */
#include "victim.h"
#include <linux/futex.h>
#include <pthread.h>

enum { HELD, ALONE, TURN, FOUGHT, ROBUST, MUTEXES };

static pthread_mutex_t mutex[MUTEXES];
static pthread_cond_t turn = PTHREAD_COND_INITIALIZER;
static volatile int got, come, over, waits;
static volatile long fights;

static unsigned word(int which) { return __atomic_load_n((unsigned *)&mutex[which].__data.__lock, __ATOMIC_SEQ_CST); }
static unsigned owner(int which) { return word(which) & FUTEX_TID_MASK; }
static unsigned self(void) { return (unsigned)syscall(SYS_gettid); }

static void wait_for(volatile int *what, int value)
{
	for (int i = 0; *what < value; i++) {
		CHECK(i < 6000);
		nap();
	}
}

static void *waiter(void *limited)
{
	struct timespec far;
	clock_gettime(CLOCK_REALTIME, &far);
	far.tv_sec += 3600;
	CHECK(!(limited ? pthread_mutex_timedlock(&mutex[HELD], &far) : pthread_mutex_lock(&mutex[HELD])));
	CHECK(owner(HELD) == self());
	got++;
	CHECK(!pthread_mutex_unlock(&mutex[HELD]));
	return 0;
}

static void *turner(void *unused)
{
	CHECK(!pthread_mutex_lock(&mutex[TURN]));
	waits = 1;
	while (!come)
		pthread_cond_wait(&turn, &mutex[TURN]);
	CHECK(owner(TURN) == self() && !pthread_mutex_unlock(&mutex[TURN]));
	return unused;
}

static void *fighter(void *unused)
{
	while (!over) {
		CHECK(!pthread_mutex_lock(&mutex[FOUGHT]));
		long before = fights;
		for (volatile int i = 0; i < 2000; i++)
			CHECK(owner(FOUGHT) == self());
		CHECK(fights == before);
		fights++;
		CHECK(!pthread_mutex_unlock(&mutex[FOUGHT]));
	}
	return unused;
}

static void *leaver(void *unused)
{
	CHECK(!pthread_mutex_lock(&mutex[ROBUST]));
	while (!over)
		nap();
	return unused; /* without unlocking it */
}

int main(int argc, char **argv)
{
	pthread_mutexattr_t attr;
	pthread_mutexattr_init(&attr);
	CHECK(!pthread_mutexattr_setprotocol(&attr, PTHREAD_PRIO_INHERIT));
	for (int i = 0; i < MUTEXES; i++) {
		CHECK(!pthread_mutexattr_setrobust(&attr, i == ROBUST ? PTHREAD_MUTEX_ROBUST : PTHREAD_MUTEX_STALLED));
		CHECK(!pthread_mutex_init(&mutex[i], &attr));
	}
	CHECK(!pthread_mutex_lock(&mutex[HELD]) && !pthread_mutex_lock(&mutex[ALONE]));
	pthread_t waiters[2], third, fighters[3], last;
	for (int i = 0; i < 2; i++)
		CHECK(!pthread_create(&waiters[i], 0, waiter, (void *)(intptr_t)i));
	CHECK(!pthread_create(&third, 0, turner, 0) && !pthread_create(&last, 0, leaver, 0));
	for (int i = 0; i < 3; i++)
		CHECK(!pthread_create(&fighters[i], 0, fighter, 0));
	wait_for(&waits, 1);
	for (int i = 0; !(word(HELD) & FUTEX_WAITERS) || !owner(ROBUST) || !fights; i++) {
		CHECK(i < 6000);
		nap();
	}
	ready(argc, argv);
	while (!told_to_end()) {
		CHECK(owner(HELD) == self() && !got && word(ALONE) == self());
		CHECK(pthread_mutex_trylock(&mutex[ROBUST]) == EBUSY);
		nap();
	}
	long before = fights;
	for (int i = 0; fights < before + 10; i++) {
		CHECK(i < 6000);
		nap();
	}
	CHECK(!pthread_mutex_unlock(&mutex[HELD]) && !pthread_mutex_unlock(&mutex[ALONE]) && !word(ALONE));
	wait_for(&got, 2);
	CHECK(!pthread_mutex_lock(&mutex[TURN]));
	come = 1;
	CHECK(!pthread_cond_broadcast(&turn) && !pthread_mutex_unlock(&mutex[TURN]));
	over = 1;
	for (int i = 0; i < 2; i++)
		CHECK(!pthread_join(waiters[i], 0));
	for (int i = 0; i < 3; i++)
		CHECK(!pthread_join(fighters[i], 0));
	CHECK(!pthread_join(third, 0) && !pthread_join(last, 0));
	CHECK(!word(HELD) && !word(FOUGHT));
	CHECK(pthread_mutex_lock(&mutex[ROBUST]) == EOWNERDEAD);
	CHECK(!pthread_mutex_consistent(&mutex[ROBUST]) && !pthread_mutex_unlock(&mutex[ROBUST]));
	return 0;
}
