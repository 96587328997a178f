/* Has one thing that cannot move, named by argv[2], and checks that being refused does it no harm. */
#include "victim.h"
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/if_packet.h>
#include <linux/perf_event.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/wait.h>

/* A kernel without it: says so, and ends as a test that does not apply. */
static long skips(long result)
{
	if (result < 0) {
		fprintf(stderr, "SKIP: %s\n", strerror(errno));
		exit(77);
	}
	return result;
}

static volatile int parted;

/* A thread that has something for itself. */
static void *part(void *flag)
{
	CHECK(!unshare((int)(long)flag));
	parted = 1;
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	CHECK(argc > 2);
	char *shared = mmap(0, 4096, 3, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t child = 0;
	if (!strcmp(argv[2], "child") || !strcmp(argv[2], "shared")) {
		CHECK((child = fork()) >= 0);
		if (!child)
			for (;;)
				pause();
	}
	if (!strcmp(argv[2], "child"))
		munmap(shared, 4096);
	if (strstr(argv[2], "sysv")) {
		int id = shmget(IPC_PRIVATE, 4096, 0600);
		void *at = shmat(id, 0, 0);
		CHECK(at != (void *)-1 && !shmctl(id, IPC_RMID, 0));
	}
	if (!strcmp(argv[2], "seccomp")) {
		struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
		struct sock_fprog program = {1, &allow};
		CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) && !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
	}
	if (!strcmp(argv[2], "memfd")) { /* mapped here, open in a child only */
		int fd = memfd_create("passed", 0);
		CHECK(fd >= 0 && !ftruncate(fd, 4096) && mmap(0, 4096, 3, MAP_SHARED, fd, 0) != MAP_FAILED);
		munmap(shared, 4096);
		CHECK((child = fork()) >= 0);
		if (!child) {
			execl("/bin/sleep", "sleep", "600", NULL);
			_exit(1);
		}
		close(fd);
	}
	if (!strcmp(argv[2], "uring")) {
		char parameters[120] = {0}; /* struct io_uring_params */
		CHECK(skips(syscall(SYS_io_uring_setup, 4, parameters)) >= 0);
	}
	if (!strcmp(argv[2], "aio")) {
		unsigned long context = 0;
		skips(syscall(SYS_io_setup, 4, &context));
	}
	if (!strcmp(argv[2], "queue"))
		CHECK(skips(syscall(SYS_mq_open, "bpfs-test", O_CREAT | O_RDWR, 0600, 0)) >= 0 && !syscall(SYS_mq_unlink, "bpfs-test"));
	if (!strcmp(argv[2], "dispatch")) {
		static char allow; /* SYSCALL_DISPATCH_FILTER_ALLOW */
		skips(prctl(PR_SET_SYSCALL_USER_DISPATCH, 1, 0, 0, &allow));
	}
	if (!strcmp(argv[2], "mdwe"))
		skips(prctl(65 /* PR_SET_MDWE */, 1, 0, 0, 0));
	if (!strcmp(argv[2], "userfault"))
		CHECK(skips(syscall(SYS_userfaultfd, O_CLOEXEC)) >= 0);
	if (!strcmp(argv[2], "secret")) {
		int fd = (int)skips(syscall(SYS_memfd_secret, 0));
		CHECK(!ftruncate(fd, 4096) && mmap(0, 4096, 3, MAP_SHARED, fd, 0) != MAP_FAILED && !close(fd));
	}
	if (!strcmp(argv[2], "ring")) { /* mapped, and open no more; as the next one */
		struct tpacket_req request = {4096, 1, 2048, 2};
		int fd = (int)skips(socket(AF_PACKET, SOCK_RAW, 0));
		skips(setsockopt(fd, SOL_PACKET, PACKET_RX_RING, &request, sizeof request));
		CHECK(mmap(0, 4096, 3, MAP_SHARED, fd, 0) != MAP_FAILED && !close(fd));
	}
	if (!strcmp(argv[2], "counter")) {
		struct perf_event_attr event = {.type = PERF_TYPE_SOFTWARE, .size = sizeof event, .config = PERF_COUNT_SW_DUMMY};
		int fd = (int)skips(syscall(SYS_perf_event_open, &event, 0, -1, -1, 0));
		CHECK(mmap(0, 8192, 3, MAP_SHARED, fd, 0) != MAP_FAILED && !close(fd));
	}
	if (!strcmp(argv[2], "hugetlb")) {
		int fd = (int)skips(memfd_create("huge", MFD_HUGETLB));
		skips(mmap(0, 2 << 20, 3, MAP_SHARED | MAP_NORESERVE, fd, 0) == MAP_FAILED ? -1 : close(fd));
	}
	static const struct {
		const char *name;
		int flag;
	} halves[] = {{"descriptors", CLONE_FILES}, {"folder", CLONE_FS}};
	for (unsigned i = 0; i < 2; i++) {
		char shared_by_child[32];
		snprintf(shared_by_child, sizeof shared_by_child, "%s of a child", halves[i].name);
		if (!strcmp(argv[2], halves[i].name)) {
			pthread_t thread;
			CHECK(!pthread_create(&thread, NULL, part, (void *)(long)halves[i].flag));
			while (!parted)
				nap();
		}
		if (!strcmp(argv[2], shared_by_child) && !(child = (pid_t)syscall(SYS_clone, halves[i].flag | SIGCHLD, 0, 0, 0, 0)))
			for (;;)
				pause();
	}
	static const struct {
		const char *name;
		int flag;
	} spaces[] = {{"user", CLONE_NEWUSER}, {"mount", CLONE_NEWNS},     {"network", CLONE_NEWNET},
		      {"uts", CLONE_NEWUTS},   {"IPC", CLONE_NEWIPC}, {"cgroup", CLONE_NEWCGROUP}};
	for (unsigned i = 0; i < sizeof spaces / sizeof *spaces; i++)
		if (!strcmp(argv[2], spaces[i].name))
			skips(unshare(spaces[i].flag));
	if (strstr(argv[2], "vfork") && !vfork()) {
		ready(argc, argv);
		while (!told_to_end())
			nap();
		_exit(0);
	}
	if (!strcmp(argv[2], "several")) {
		int id = shmget(IPC_PRIVATE, 4096, 0600);
		void *at = shmat(id, 0, 0);
		CHECK(at != (void *)-1 && !shmctl(id, IPC_RMID, 0) && (child = fork()) >= 0);
		if (!child)
			for (;;)
				pause();
	}
	ready(argc, argv);
	while (!told_to_end())
		nap();
	if (child) {
		int status;
		kill(child, SIGKILL);
		CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status));
	}
	return 0;
}
