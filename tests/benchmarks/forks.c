/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What a job does on a node as it would at home. `forks calls`: ns of processor time for each of
 * getpid, read, write, futex, and ns for a fork + exec + wait. `forks storm CHILDREN WAYS US`: so many forks by so many processes at once, of children that live
 * US microseconds; says how many were waited for and how many seconds it took. `forks signals PID...`: ns of a kill of itself, and of
 * each of these, by the signal 0. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CALLS 200000
#define FORKS 200
#define SIGNALS 200

static uint32_t word;

static double at(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static double now(void)
{
	return at(CLOCK_MONOTONIC);
}

/* Processor time: other work on the machine does not count. */
static double used(void)
{
	return at(CLOCK_PROCESS_CPUTIME_ID);
}

static void fork_and_exec(void)
{
	pid_t child = vfork();
	if (child == 0) {
		execl("/bin/true", "true", (char *)0);
		_exit(127);
	}
	int status;
	if (child < 0 || waitpid(child, &status, 0) != child || status)
		exit(1);
}

static void calls(void)
{
	int zero = open("/dev/zero", O_RDWR);
	char data[64] = { 0 };
	double t[6];

	t[0] = used();
	for (int i = 0; i < CALLS; i++)
		syscall(SYS_getpid);
	t[1] = used();
	for (int i = 0; i < CALLS; i++)
		if (read(zero, data, sizeof(data)) < 0)
			exit(1);
	t[2] = used();
	for (int i = 0; i < CALLS; i++)
		if (write(zero, data, sizeof(data)) < 0)
			exit(1);
	t[3] = used();
	for (int i = 0; i < CALLS; i++)
		syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
	t[4] = used();
	double began = now();
	for (int i = 0; i < FORKS; i++)
		fork_and_exec();
	t[5] = t[4] + now() - began;
	for (int i = 0; i < 5; i++)
		printf("%.1f ", (t[i + 1] - t[i]) * 1e9 / (i == 4 ? FORKS : CALLS));
	printf("\n");
}

static void signals(int count, char **pids)
{
	for (int i = -1; i < count; i++) {
		pid_t pid = i < 0 ? getpid() : atoi(pids[i]);
		double began = now();

		for (int turn = 0; turn < SIGNALS; turn++)
			if (kill(pid, 0))
				exit(1);
		printf("%.1f ", (now() - began) * 1e9 / SIGNALS);
	}
	printf("\n");
}

static int forker(int children, int us)
{
	int waited = 0;

	for (int i = 0; i < children; i++) {
		pid_t child = fork();
		if (child == 0) {
			if (us)
				usleep(us);
			_exit(0);
		}
		int status;
		if (child > 0 && waitpid(child, &status, 0) == child && status == 0)
			waited++;
	}
	return waited;
}

static void storm(int children, int ways, int us)
{
	int ends[2], waited = 0, part;
	double began = now();

	if (pipe(ends) < 0)
		exit(1);
	for (int i = 0; i < ways; i++)
		if (fork() == 0) {
			part = forker(children / ways, us);
			_exit(write(ends[1], &part, sizeof(part)) != sizeof(part));
		}
	close(ends[1]);
	while (read(ends[0], &part, sizeof(part)) == sizeof(part))
		waited += part;
	while (wait(NULL) > 0)
		;
	printf("%d %.3f\n", waited, now() - began);
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "calls"))
		calls();
	else if (argc > 1 && !strcmp(argv[1], "signals"))
		signals(argc - 2, argv + 2);
	else if (argc == 5)
		storm(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
	else
		return 2;
	return 0;
}
