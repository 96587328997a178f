/* Checks: robust list, clear_child_tid and rseq of main thread and another; a mutex whose owner ends after the move tells so. */
#include "victim.h"
#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/rseq.h>

struct seen { void *head; size_t length; void *tid_address; };

static pthread_mutex_t mutex;
static pthread_barrier_t locked;

static struct seen look(void)
{
	struct seen s = {0};
	CHECK(!syscall(SYS_get_robust_list, 0, &s.head, &s.length));
	CHECK(!prctl(PR_GET_TID_ADDRESS, &s.tid_address, 0, 0, 0));
	return s;
}

static void check(const struct seen *before)
{
	struct seen s = look();
	CHECK(s.head == before->head && s.length == before->length && s.tid_address == before->tid_address);
	/* The kernel writes the CPU there whenever the thread has moved to another. */
	struct rseq *r = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
	if (__rseq_size)
		for (int i = 0; i < 4; i++) {
			sched_yield();
			unsigned cpu, id;
			do {
				id = __atomic_load_n(&r->cpu_id, __ATOMIC_RELAXED);
				CHECK(!syscall(SYS_getcpu, &cpu, 0, 0));
			} while (id != __atomic_load_n(&r->cpu_id, __ATOMIC_RELAXED));
			CHECK(id == cpu);
		}
}

static void *owner(void *unused)
{
	(void)unused;
	CHECK(!pthread_mutex_lock(&mutex));
	struct seen before = look();
	pthread_barrier_wait(&locked);
	while (!told_to_end())
		nap();
	check(&before);
	return 0; /* without unlocking it */
}

int main(int argc, char **argv)
{
	pthread_mutexattr_t attr;
	pthread_mutexattr_init(&attr);
	CHECK(!pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST) && !pthread_mutex_init(&mutex, &attr));
	CHECK(!pthread_barrier_init(&locked, 0, 2));
	CHECK(argc > 1);
	stop_file = argv[1];
	pthread_t thread;
	CHECK(!pthread_create(&thread, 0, owner, 0));
	pthread_barrier_wait(&locked);
	struct seen before = look();
	ready(argc, argv);
	while (!told_to_end())
		nap();
	check(&before);
	CHECK(!pthread_join(thread, 0)); /* by clear_child_tid */
	CHECK(pthread_mutex_lock(&mutex) == EOWNERDEAD);
	CHECK(!pthread_mutex_consistent(&mutex) && !pthread_mutex_unlock(&mutex));
	return 0;
}
