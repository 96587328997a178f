/* Checks what each thread has switched for itself: the time stamp counter and CPUID of main end it by a signal, those of another thread
 * do not; speculation, where the CPU lets a process choose; and huge pages for who asks only. Further, a removed working directory. */
#include "victim.h"
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <sys/prctl.h>

#define ARCH_GET_CPUID 0x1011
#define ARCH_SET_CPUID 0x1012
#define IO_FLUSHER 57
#define KINDS 3

static _Thread_local sigjmp_buf back;

static void on_fault(int signal) { (void)signal, siglongjmp(back, 1); }

static int faults(int cpuid)
{
	if (sigsetjmp(back, 1))
		return 1;
	if (cpuid) {
		unsigned a = 0, b, c = 0, d;
		__asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
	} else
		__builtin_ia32_rdtsc();
	return 0;
}

static int speculation(int which) { return prctl(PR_GET_SPECULATION_CTRL, which, 0, 0, 0); }

static int can_fault, flushes;
static volatile int over;

static void look(int should, const int *before)
{
	int tsc = 0;
	CHECK(!prctl(PR_GET_TSC, &tsc) && tsc == (should ? PR_TSC_SIGSEGV : PR_TSC_ENABLE));
	CHECK(faults(0) == should && faults(1) == (should && can_fault));
	for (int which = 0; which < KINDS; which++)
		CHECK(speculation(which) == before[which]);
}

static void *other(void *unused)
{
	int before[KINDS];
	CHECK(!prctl(PR_SET_TSC, PR_TSC_ENABLE) && (!can_fault || !syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1)));
	for (int which = 0; which < KINDS; which++)
		before[which] = speculation(which);
	while (!over)
		look(0, before), nap();
	return unused;
}

static void removed_folder(const char *parent)
{
	char path[4096];
	struct stat info;
	errno = 0;
	CHECK(!stat(".", &info) && info.st_nlink == 0);
	CHECK(syscall(SYS_getcwd, path, sizeof path) < 0 && errno == ENOENT);
	CHECK(open("file", O_CREAT | O_WRONLY, 0600) < 0 && errno == ENOENT);
	int above = open("..", O_PATH | O_DIRECTORY), real = open(parent, O_PATH | O_DIRECTORY);
	struct stat one, two;
	CHECK(above >= 0 && real >= 0 && !fstat(above, &one) && !fstat(real, &two) && one.st_ino == two.st_ino);
	CHECK(!close(above) && !close(real));
}

int main(int argc, char **argv)
{
	int before[KINDS], thp;
	char path[4200];
	CHECK(argc > 1);
	snprintf(path, sizeof path, "%s.folder", argv[1]);
	*strrchr(path, '/') = 0;
	char *parent = strdup(path);
	snprintf(path, sizeof path, "%s.folder", argv[1]);
	CHECK(!mkdir(path, 0700) && !chdir(path) && !rmdir(path));
	struct sigaction action = {.sa_handler = on_fault};
	CHECK(!sigaction(SIGSEGV, &action, NULL));
	can_fault = !syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0); /* not every CPU */
	CHECK(!prctl(PR_SET_TSC, PR_TSC_SIGSEGV));
	for (int which = 0; which < KINDS; which++)
		if (speculation(which) & PR_SPEC_PRCTL)
			CHECK(!prctl(PR_SET_SPECULATION_CTRL, which, PR_SPEC_DISABLE, 0, 0));
	if (prctl(PR_SET_THP_DISABLE, 1, 2, 0, 0)) /* PR_THP_DISABLE_EXCEPT_ADVISED, Linux 6.18 */
		CHECK(!prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
	thp = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
	flushes = !prctl(IO_FLUSHER, 1, 0, 0, 0); /* wants CAP_SYS_RESOURCE */
	for (int which = 0; which < KINDS; which++)
		before[which] = speculation(which);
	pthread_t thread;
	CHECK(!pthread_create(&thread, NULL, other, NULL));
	look(1, before);
	ready(argc, argv);
	while (!told_to_end())
		look(1, before), removed_folder(parent), nap();
	CHECK(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == thp && (!flushes || prctl(IO_FLUSHER + 1, 0, 0, 0, 0) == 1));
	over = 1;
	CHECK(!pthread_join(thread, NULL));
	return 0;
}
