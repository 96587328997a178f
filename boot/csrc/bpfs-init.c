/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * pid 1 of a node that was booted from one of our images: mounts what the kernel offers, keeps the node's one program
 * running, reaps orphans, and feeds the watchdog. The program (python -m boot.node) looks for the network and becomes
 * bpslave; when it ends, however, it is started again.
 *
 * The name matters: bpslave takes a machine for a real node only where pid 1 is called bpfs-init (bpfs/slave/machine.py).
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NAME "bpfs-init"
#define PYTHON "/usr/lib/bpfs/bpfs-python"

/* linux/watchdog.h, which musl's compiler does not find */
#define WDIOC_KEEPALIVE _IOR('W', 5, int)
#define WDIOC_SETTIMEOUT _IOWR('W', 6, int)
#define WDIOC_GETTIMEOUT _IOR('W', 7, int)

#define FEED_S 5            /* between two feedings of the watchdog; its own time is at least twice that */
#define WATCHDOG_S 60       /* after which the hardware resets a machine that does not feed it */
#define WATCHDOG_FIRST_S 300 /* in phase 1: nobody feeds it while kernels are switched and the next one looks at its hardware */
#define SHORT_S 5           /* a program that lives shorter is started again after a pause that doubles */
#define PAUSE_MAX_S 30
#define LEAVE_S 20          /* that the program has to leave its master, when the console says reboot */
#define SYNC_S 5            /* and that disks have for what is to be written */

static const struct {
	const char *type, *target, *options;
	unsigned long flags;
} MOUNTS[] = {
	{"proc", "/proc", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC},
	{"sysfs", "/sys", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC},
	{"devtmpfs", "/dev", "mode=755", MS_NOSUID},
	{"devpts", "/dev/pts", "mode=620,gid=5,ptmxmode=666", MS_NOSUID | MS_NOEXEC},
	{"tmpfs", "/dev/shm", "mode=1777", MS_NOSUID | MS_NODEV},
	{"tmpfs", "/run", "mode=755", MS_NOSUID | MS_NODEV},
	{"tmpfs", "/tmp", "mode=1777", MS_NOSUID | MS_NODEV},
	{"cgroup2", "/sys/fs/cgroup", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC},
};

static void say(const char *format, ...)
{
	va_list list;
	va_start(list, format);
	dprintf(2, NAME ": ");
	vdprintf(2, format, list);
	dprintf(2, "\n");
	va_end(list);
}

static void mount_all(void)
{
	for (size_t i = 0; i < sizeof MOUNTS / sizeof *MOUNTS; i++) {
		mkdir(MOUNTS[i].target, 0755);
		/* EBUSY: the kernel has mounted devtmpfs itself. */
		if (mount(MOUNTS[i].type, MOUNTS[i].target, MOUNTS[i].type, MOUNTS[i].flags, MOUNTS[i].options) < 0 && errno != EBUSY)
			say("%s cannot be mounted: %s", MOUNTS[i].target, strerror(errno));
	}
}

/* The kernel's first root file system has no mount below it, and whoever has none cannot pivot_root(2), as the jobs'
 * own root wants it: bind it over itself and go there. */
static void bind_root(void)
{
	if (mount("/", "/mnt", NULL, MS_BIND, NULL) < 0 || chdir("/mnt") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 ||
	    chroot(".") < 0)
		say("the root cannot be bound: %s", strerror(errno));
	chdir("/");
}

static void open_console(void)
{
	int fd = open("/dev/console", O_RDWR | O_NOCTTY);
	if (fd < 0)
		fd = open("/dev/null", O_RDWR);
	for (int i = 0; i < 3 && fd >= 0; i++)
		dup2(fd, i);
	if (fd > 2)
		close(fd);
}

static int first_phase(void)
{
	char phase = 0;
	int fd = open("/etc/beowulf/phase", O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		(void)!read(fd, &phase, 1);
		close(fd);
	}
	return phase == '1';
}

/* Feeds the watchdog when there is one; it may appear later, with its driver. */
static void feed(void)
{
	static int fd = -1;
	int seconds = first_phase() ? WATCHDOG_FIRST_S : WATCHDOG_S;
	if (fd < 0) {
		fd = open("/dev/watchdog", O_WRONLY | O_CLOEXEC);
		if (fd < 0)
			return;
		/* A driver that cannot set its time keeps its own. */
		if (ioctl(fd, WDIOC_SETTIMEOUT, &seconds) < 0 && ioctl(fd, WDIOC_GETTIMEOUT, &seconds) < 0)
			seconds = 0;
		say("the watchdog is fed; it resets the machine after %d s", seconds);
	}
	ioctl(fd, WDIOC_KEEPALIVE, 0);
}

static pid_t start(const sigset_t *inherited)
{
	static char *const arguments[] = {PYTHON, "-S", "-s", "-B", "-u", "-m", "boot.node", NULL};
	static char *const environment[] = {
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "LANG=C.UTF-8",
		"PYTHONHOME=/usr/lib/bpfs/python", "PYTHONPATH=/usr/lib/bpfs/python:/usr/lib/bpfs/python/lib-dynload:/usr/lib/bpfs/site",
		"LD_LIBRARY_PATH=/usr/lib/bpfs/lib", NULL,
	};
	pid_t pid = fork();
	if (pid == 0) {
		sigprocmask(SIG_SETMASK, inherited, NULL);
		setsid();
		execve(PYTHON, arguments, environment);
		say("%s cannot be run: %s", PYTHON, strerror(errno));
		_exit(127);
	}
	return pid;
}

static time_t now(void)
{
	struct timespec time; /* the master sets the other clock */
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec;
}

/* A child writes what is to be written: a file system of a server that is out of reach would hold us up for ever. */
static void restart_machine(void)
{
	pid_t child = fork();
	if (child == 0) {
		sync();
		_exit(0);
	}
	for (int i = 0; i < SYNC_S * 100 && child > 0 && waitpid(child, NULL, WNOHANG) == 0; i++)
		nanosleep(&(struct timespec){0, 10000000}, NULL);
	reboot(RB_AUTOBOOT);
}

/* Until the program has ended, or for some seconds where there is none; gives its wait status. Ctrl-Alt-Del has it end first:
 * bpslave kills its jobs and leaves its master. The second one, or one where there is no program, does not wait for that. */
static int watch(pid_t program, const sigset_t *signals, time_t seconds)
{
	time_t end = now() + seconds;
	int leaving = 0;
	for (;;) {
		int status;
		pid_t pid;
		while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
			if (pid == program && leaving)
				restart_machine();
			if (pid == program)
				return status;
		}
		feed();
		if ((program <= 0 || leaving) && now() >= end) {
			if (leaving)
				restart_machine();
			return 0;
		}
		struct timespec wait = {program > 0 && !leaving ? FEED_S : 1, 0};
		if (sigtimedwait(signals, NULL, &wait) == SIGINT) {
			say("told by the console to reboot");
			if (program <= 0 || leaving || kill(program, SIGTERM) < 0)
				restart_machine();
			leaving = 1;
			end = now() + LEAVE_S;
		}
	}
}

int main(void)
{
	sigset_t signals, inherited;
	time_t pause = 0;

	if (getpid() != 1) {
		fprintf(stderr, NAME ": this is pid 1 of a node image, and nothing else\n");
		return 1;
	}
	prctl(PR_SET_NAME, NAME);
	bind_root();
	mount_all();
	open_console();
	reboot(RB_DISABLE_CAD);
	sigemptyset(&signals);
	sigaddset(&signals, SIGCHLD);
	sigaddset(&signals, SIGINT);
	sigprocmask(SIG_BLOCK, &signals, &inherited);
	for (;;) {
		struct timespec began, ended;
		clock_gettime(CLOCK_MONOTONIC, &began);
		pid_t program = start(&inherited);
		int status = program > 0 ? watch(program, &signals, 0) : -1;
		clock_gettime(CLOCK_MONOTONIC, &ended);
		say("the node's program ended (%s %d); it is started again",
		    WIFSIGNALED(status) ? "signal" : "exit code", WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
		pause = ended.tv_sec - began.tv_sec >= SHORT_S ? 0 : pause ? (pause * 2 > PAUSE_MAX_S ? PAUSE_MAX_S : pause * 2) : 1;
		watch(0, &signals, pause);
	}
}
