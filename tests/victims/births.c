/* Checks that threads which start and end all the time, in several families at once, lose no wake-up and no start. */
#include "victim.h"
#include <pthread.h>

#define FAMILIES 4
static volatile int stop;
static long born[FAMILIES], ended[FAMILIES];

static void *child(void *counter)
{
	__atomic_add_fetch((long *)counter, 1, __ATOMIC_SEQ_CST);
	return counter;
}

static void *family(void *argument)
{
	long index = (long)argument;
	while (!stop) {
		pthread_t threads[3];
		void *result;
		for (int i = 0; i < 3; i++, born[index]++)
			CHECK(!pthread_create(&threads[i], NULL, child, &ended[index]));
		for (int i = 0; i < 3; i++)
			CHECK(!pthread_join(threads[i], &result) && result == &ended[index]);
		CHECK(ended[index] == born[index]);
	}
	return argument;
}

int main(int argc, char **argv)
{
	pthread_t families[FAMILIES];
	for (long i = 0; i < FAMILIES; i++)
		CHECK(!pthread_create(&families[i], NULL, family, (void *)i));
	ready(argc, argv);
	while (!told_to_end())
		nap();
	long before = born[0] + born[1] + born[2] + born[3];
	while (born[0] + born[1] + born[2] + born[3] < before + 100)
		nap();
	stop = 1;
	for (int i = 0; i < FAMILIES; i++)
		CHECK(!pthread_join(families[i], NULL));
	return 0;
}
