/* nodeinit: pid 1 of a node's job pid namespace, and every placeholder in it.
 *
 * usage: nodeinit REPORT_FD FIRST_PID END_PID
 * environment: BPFS_COOKIE=16 hex digits, BPFS_ROOT=DIR a mount that is to be the root of the jobs,
 * BPFS_CLOCKS=text for timens_offsets
 *
 * It makes the namespaces, says which pid it got, and then only waits for signals: children that
 * change state and signals that jobs send are reported, one SEQPACKET packet each. Placeholders
 * are clones of it that run the same loop under a chosen pid, so that a process whose parent,
 * group leader or session leader is on another node has them natively. No libc: such a process
 * must cost a few pages only, and the engine clones it for every process that arrives.
 *
 * When it dies the kernel kills the whole namespace: it ends with its daemon (parent-death signal
 * and the end of the report socket).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later */
#include "nodeinit.h"
#include "x86_64.h"

#include <asm/ioctls.h>
#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/mman.h>
#include <linux/mount.h>
#include <linux/prctl.h>
#include <linux/resource.h>
#include <linux/sched.h>
#include <linux/stat.h>
#include <linux/wait.h>
#include <asm/errno.h>
#include <asm/signal.h>
#include <asm/siginfo.h>
#include <linux/time_types.h>

static uint64_t sent_value; /* of the next COMMAND_SEND */
static int64_t lease_ms; /* when all must have ended, by CLOCK_BOOTTIME; 0: never */
#define COMMAND_SIGNAL 64 /* SIGRTMAX: the least likely to be a job's own */
#define EVERY_SIGNAL (~0UL)
#define MSG_DONTWAIT_ 0x40
#define MSG_PEEK_ 2
#define MSG_NOSIGNAL_ 0x4000
#define MNT_DETACH 2
#define SOL_SOCKET_ 1
#define SO_PEERCRED_ 17
#define AF_UNIX_ 1
#define SOCK_SEQPACKET_ 5
#define HIDDEN "/proc/nodeinit"
#define PROGRAM_MAX (1 << 20)

/* How often pid 1 looks at the pid counter. Half of a block, 1,024 pids, are what 10 forks a ms take in the one, which
 * nobody's first storm exceeds, and 50 in the other. A look takes some 3 us. */
#define CALM_MS 100
#define STORM_MS 20
#define CLOCK_BOOTTIME_ 7

static int report_fd;
static uint32_t cookie;
static const char *root, *clocks;
static long own_program = -1;
static int last_pid_fd = -1;
static int first_pid, end_pid, seen_pid;

#define call(number, ...) CALL_(number, __VA_ARGS__, 0, 0, 0, 0, 0, 0)
#define CALL_(number, a, b, c, d, e, f, ...) \
	call6(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

/* gcc turns loops and initializers into calls of these. */
void *memset(void *to, int byte, unsigned long count)
{
	char *p = to;
	while (count--)
		*p++ = (char)byte;
	return to;
}

void *memcpy(void *to, const void *from, unsigned long count)
{
	char *p = to;
	const char *q = from;
	while (count--)
		*p++ = *q++;
	return to;
}

static _Noreturn void end(int code)
{
	for (;;)
		call(__NR_exit_group, code);
}

/* The daemon is gone, and nothing may outlive it. A daemon that dies closes its files first, and then has its children
 * killed, oldest first: who carries what the jobs write must be dead before they are, or it would tell their ends of
 * pipes as closed by themselves. So that signal is waited for; it does not come where only the reports are not wanted. */
#define DEATH_SIGNAL_NS 300000000

static _Noreturn void end_after_daemon(int code)
{
	struct __kernel_timespec pause = {.tv_nsec = DEATH_SIGNAL_NS};
	call(__NR_nanosleep, &pause, 0);
	end(code);
}

/* Nobody reads the reports any more: the daemon is gone. */
static void send_report(const struct report *report)
{
	for (;;) {
		long sent = call(__NR_sendto, report_fd, report, sizeof *report, MSG_NOSIGNAL_, 0, 0);
		if (sent == sizeof *report)
			return;
		if (sent == -EPIPE || sent == -ECONNRESET || sent == -ENOTCONN || sent == -EBADF)
			end_after_daemon(1);
	}
}

static int text_to_int(const char *text)
{
	int value = 0;
	while (*text >= '0' && *text <= '9')
		value = value * 10 + *text++ - '0';
	return value;
}

static uint64_t hex_to_u64(const char *text)
{
	uint64_t value = 0;
	for (; *text; text++)
		value = value << 4 | (uint64_t)(*text <= '9' ? *text - '0' : *text - 'a' + 10);
	return value;
}

static int own_pid(void)
{
	return (int)call(__NR_getpid, 0);
}

/* ---- the pid block ---------------------------------------------------------------------- */

static int read_last_pid(void)
{
	char text[16] = {0};
	long count = call(__NR_pread64, last_pid_fd, text, sizeof text - 1, 0);
	return count > 0 ? text_to_int(text) : -1;
}

static int restart_block(void)
{
	char text[16];
	int at = sizeof text, value = first_pid - 1;
	do
		text[--at] = (char)('0' + value % 10);
	while (value /= 10);
	seen_pid = first_pid - 1;
	return call(__NR_pwrite64, last_pid_fd, text + at, sizeof text - at, 0) > 0;
}

/* ns_last_pid is the namespace's own since 3.3; the limit is kept here by starting over at half
 * of the block. The namespace's pid_max (6.14) would not do: a process that arrives from another
 * node's block must be cloned with a pid above it, which the kernel refuses.
 * Returns whether a fork storm is going on. */
static int watch_block(void)
{
	if (last_pid_fd < 0)
		return 0;
	int now = read_last_pid();
	if (now < 0)
		return 0;
	int moved = now - seen_pid;
	seen_pid = now;
	if (now < first_pid - 1 || now > first_pid + (end_pid - first_pid) / 2)
		restart_block();
	return moved < 0 || moved > (end_pid - first_pid) / 16;
}

/* ---- children and signals ---------------------------------------------------------------- */

static uint64_t to_us(struct __kernel_old_timeval time)
{
	return (uint64_t)time.tv_sec * 1000000 + (uint64_t)time.tv_usec;
}

/* Told first and taken after: a placeholder may be killed at any point of this, by a job for example. What it has not taken
 * then goes to init, which tells it. */
static void report_children(void)
{
	for (;;) {
		siginfo_t info;
		struct rusage usage;
		info.si_pid = 0;
		long error = call(__NR_waitid, P_ALL, 0, &info,
		                  WEXITED | WSTOPPED | WCONTINUED | WNOHANG | WNOWAIT | __WALL, &usage);
		if (error < 0 || !info.si_pid)
			return;
		struct report report = {
			.kind = REPORT_CHILD,
			.pid = info.si_pid,
			.reporter = own_pid(),
			.code = info.si_code,
			.status = info.si_status,
			.uid = info.si_uid,
			.utime_us = to_us(usage.ru_utime),
			.stime_us = to_us(usage.ru_stime),
			.maxrss_kb = usage.ru_maxrss,
		};
		send_report(&report);
		/* Only what was told: it may have gone on, or ended, meanwhile. */
		int told = info.si_code == CLD_STOPPED ? WSTOPPED : info.si_code == CLD_CONTINUED ? WCONTINUED : WEXITED;
		call(__NR_waitid, P_PID, report.pid, &info, told | WNOHANG | __WALL, 0);
	}
}

static uint32_t continues; /* SIGCONTs that have been told: a stop that was before them comes too late */

/* What the kernel sends (a key typed, a terminal hung up, an orphaned group) it sends to the process on its own machine, too. */
static void report_signal(const siginfo_t *info)
{
	if (info->si_code == SI_KERNEL)
		return;
	/* From outside: the real process was continued, and has it already. */
	if (info->si_signo == SIGCONT && info->si_pid == 0 && info->si_code == SI_USER)
		return;
	struct report report = {
		.kind = REPORT_SIGNAL,
		.pid = own_pid(),
		.reporter = own_pid(),
		.code = info->si_code,
		.status = info->si_signo,
		.uid = info->si_code <= 0 ? info->si_uid : 0,
		.utime_us = info->si_code == SI_QUEUE ? (uint64_t)info->si_value.sival_ptr : 0,
		.sender = info->si_code <= 0 ? info->si_pid : 0,
	};
	if (info->si_signo == SIGCONT)
		report.stime_us = ++continues;
	send_report(&report);
}

/* Returns as fork does. */
static long clone_placeholder(int pid, uint64_t command)
{
	int32_t tid = pid;
	struct clone_args args = {
		.flags = command & COMMAND_SIBLING ? CLONE_PARENT : 0,
		.exit_signal = command & COMMAND_SIBLING ? 0 : SIGCHLD,
		.set_tid = (uint64_t)&tid,
		.set_tid_size = 1,
	};
	return pid ? call(__NR_clone3, &args, sizeof args) : 0;
}

#include "bear.h"

/* ---- the session's terminal ---------------------------------------------------------------- */

/* TIOCNOTTY sends SIGHUP to the foreground group: a group that nobody is in any more is put there before. */
static void let_go_of_terminal(void)
{
	long tty = call(__NR_open, "/dev/tty", O_RDWR | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0);
	if (tty < 0)
		return; /* there is none */
	long child = call(__NR_clone, 0, 0, 0, 0, 0);
	while (child == 0)
		call(__NR_pause, 0);
	int group = (int)child;
	if (child > 0) {
		call(__NR_setpgid, child, child);
		call(__NR_ioctl, tty, TIOCSPGRP, &group);
		call(__NR_kill, child, SIGKILL);
		while (call(__NR_wait4, child, 0, __WALL, 0) == -EINTR)
			;
		call(__NR_ioctl, tty, TIOCNOTTY, 0);
	}
	call(__NR_close, tty);
}

static void take_terminal(int number)
{
	char path[24] = "/dev/pts/";
	char digits[12];
	int count = 0, at = 9;
	do
		digits[count++] = (char)('0' + number % 10);
	while (number /= 10);
	while (count)
		path[at++] = digits[--count];
	long tty = call(__NR_open, path, O_RDWR | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0);
	if (tty < 0)
		return;
	call(__NR_ioctl, tty, TIOCSCTTY, 0);
	call(__NR_close, tty);
}

static void put_in_front(int group)
{
	long tty = call(__NR_open, "/dev/tty", O_RDWR | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0);
	if (tty < 0)
		return;
	call(__NR_ioctl, tty, TIOCSPGRP, &group);
	call(__NR_close, tty);
}

/* ---- standing for a child that is elsewhere --------------------------------------------------- */

static void let_come(int signal, int how)
{
	uint64_t set = 1UL << (signal - 1);
	call(__NR_rt_sigprocmask, how, &set, 0, sizeof set);
}

/* With every action at its default and no core. */
static void suffer(int signal)
{
	call(__NR_kill, own_pid(), signal);
	let_come(signal, SIG_UNBLOCK);
	let_come(signal, SIG_BLOCK);
}

static void end_as(int status)
{
	struct rlimit64 none = {0, 0};
	if (!(status & 0x7f))
		end(status >> 8 & 0xff);
	call(__NR_prlimit64, 0, RLIMIT_CORE, &none, 0);
	suffer(status & 0x7f);
	end(128 + (status & 0x7f));
}

/* In the name of the process that we stand for: the kernel says so in siginfo. */
static void send_signal(int pid, uint32_t what)
{
	siginfo_t info = {.si_signo = (int)(what & 0xff), .si_code = SI_QUEUE};

	if (!(what & SENT_QUEUED)) {
		call(__NR_kill, pid, info.si_signo);
		return;
	}
	info.si_pid = own_pid();
	info.si_uid = (uint32_t)call(__NR_getuid, 0);
	info.si_value.sival_ptr = (void *)sent_value;
	call(__NR_rt_sigqueueinfo, pid, info.si_signo, &info);
}

static void obey(uint64_t command, uint32_t uid, uint32_t more)
{
	int pid = (int)(command & COMMAND_PID_MASK);
	if (command & COMMAND_SEND) {
		if (pid)
			send_signal(pid, more);
		else
			sent_value = (uint64_t)more << 32 | uid;
		return;
	}
	if (command & COMMAND_END && own_pid() != 1)
		end_as(pid);
	if (command & COMMAND_STOP && own_pid() != 1) {
		if (continues > more)
			return;
		call(__NR_prctl, PR_SET_NAME, "nodeinit-halted"); /* jobwatch: nobody else has stopped it */
		suffer(pid);
		call(__NR_prctl, PR_SET_NAME, "nodeinit");
		return;
	}
	if (command & COMMAND_KILL_ALL) {
		call(__NR_kill, -1, SIGKILL);
		return;
	}
	if ((command & COMMAND_BEAR) == COMMAND_BEAR) {
		bear();
		return;
	}
	if ((command & COMMAND_LEASE) == COMMAND_LEASE) {
		lease_ms = (int64_t)((uint64_t)more << 32 | uid);
		return;
	}
	if ((command & COMMAND_FOREGROUND) == COMMAND_FOREGROUND) {
		put_in_front(pid);
		return;
	}
	if (command & COMMAND_TERMINAL) {
		let_go_of_terminal();
		take_terminal(pid);
		return;
	}
	long made = clone_placeholder(pid, command);
	if (made < 0) {
		struct report report = {.kind = REPORT_FAILED, .pid = pid, .reporter = own_pid(),
		                        .code = (int32_t)command, .status = (int32_t)-made};
		send_report(&report);
	}
	if (made != 0)
		return;
	/* The real uid is the user's, so that he may signal it like the process it stands for; the
	 * effective one stays root, which set_tid needs. */
	if (pid)
		call(__NR_setresuid, uid, 0, 0);
	lead(command);
}

/* From an ancestor namespace si_pid is 0, yet a job may write that into a queued signal as well:
 * the cookie is what tells. */
static int is_command(const siginfo_t *info)
{
	return info->si_signo == COMMAND_SIGNAL && info->si_code == SI_QUEUE && info->si_pid == 0 &&
	       (uint64_t)info->si_value.sival_ptr >> 32 == cookie;
}

static void end_without_daemon(void)
{
	char byte;
	if (call(__NR_recvfrom, report_fd, &byte, 1, MSG_PEEK_ | MSG_DONTWAIT_, 0, 0) == 0)
		end_after_daemon(0);
}

/* How long pid 1 may wait for the next signal. It is the last to heed the lease: of all daemons, even the supervisor may be
 * dead or stopped, and its own end is that of all jobs. */
static struct __kernel_timespec next_look(int storm)
{
	struct __kernel_timespec now;
	int64_t wait = storm ? STORM_MS : CALM_MS;
	if (lease_ms) {
		call(__NR_clock_gettime, CLOCK_BOOTTIME_, &now);
		int64_t left = lease_ms - (now.tv_sec * 1000 + now.tv_nsec / 1000000);
		if (left <= 0)
			end(3);
		if (left < wait)
			wait = left;
	}
	return (struct __kernel_timespec){.tv_sec = wait / 1000, .tv_nsec = wait % 1000 * 1000000};
}

static _Noreturn void loop(void)
{
	uint64_t every = EVERY_SIGNAL;
	int storm = 0;
	for (;;) {
		siginfo_t info;
		int first = own_pid() == 1;
		struct __kernel_timespec pause = {0};
		if (first)
			pause = next_look(storm);
		long got = call(__NR_rt_sigtimedwait, &every, &info, first ? &pause : 0, sizeof every);
		/* Also when nothing came: a tracer's stop can eat the wake-up. */
		report_children();
		if (got > 0 && is_command(&info))
			obey((uint64_t)info.si_value.sival_ptr & 0xffffffff, info.si_uid, (uint32_t)info.si_errno);
		else if (got == SIGIO && info.si_code == SI_KERNEL)
			end_without_daemon();
		else if (got > 0 && !(got == SIGCHLD && info.si_code > 0))
			report_signal(&info);
		if (own_pid() == 1)
			storm = watch_block();
	}
}

/* ---- start -------------------------------------------------------------------------------- */

static void open_block(void)
{
	last_pid_fd = (int)call(__NR_open, "/proc/sys/kernel/ns_last_pid", O_RDWR | O_CLOEXEC, 0);
	if (last_pid_fd >= 0 && !restart_block()) {
		call(__NR_close, last_pid_fd);
		last_pid_fd = -1;
	}
}

static void fail(long error)
{
	struct report report = {.kind = REPORT_BORN, .status = (int32_t)-error};
	send_report(&report);
	end(1);
}

/* The jobs see nothing of the daemon's own root: the old one is stacked below the new one, and taken away. A root that
 * is the initramfs cannot be: the new one is moved on top of it, and whatever leads to the top leads there. */
static long enter_root(void)
{
	long error = call(__NR_chdir, root);
	if (error)
		return error;
	error = call(__NR_pivot_root, ".", ".");
	if (!error) {
		error = call(__NR_umount2, ".", MNT_DETACH);
	} else if (error == -EINVAL) {
		error = call(__NR_mount, ".", "/", 0, MS_MOVE, 0);
		if (!error)
			error = call(__NR_chroot, ".");
	}
	return error ? error : call(__NR_chdir, "/");
}

/* Mounts made outside later (the node's /bpfs, the view) go on arriving here; none goes out. */
static void set_up_mounts(void)
{
	long error = call(__NR_mount, "none", "/", 0, MS_REC | MS_SLAVE, 0);
	if (!error && root)
		error = enter_root();
	if (error)
		fail(error);
}

static void mount_proc(void)
{
	long error = call(__NR_mount, "proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0);
	if (error)
		fail(error);
}

static long copy_program(void)
{
	long file = call(__NR_open, HIDDEN, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0700);
	long copied;
	if (file < 0)
		return file;
	do
		copied = call(__NR_sendfile, file, own_program, 0, PROGRAM_MAX);
	while (copied > 0);
	if (!copied)
		copied = call(__NR_fchmod, file, 04711);
	call(__NR_close, file);
	return copied;
}

/* A job of an ordinary user that leaves, and has children here, turns into its placeholder by running this program,
 * which needs root's rights to give birth and to become the job again. So it is set-user-ID here, on a file system that
 * the mount of /proc is going to hide: nobody finds it but who may look into this process. Unreadable, and so not
 * dumpable: the user cannot look into what runs it. Without it (no tmpfs), only root's jobs have that. */
static void move_to_hidden_program(char **argv, char **envp)
{
	if (call(__NR_mount, "nodeinit", "/proc", "tmpfs", MS_NODEV, "mode=0700,size=1m"))
		return;
	if (!copy_program())
		call(__NR_execve, HIDDEN, argv, envp);
	call(__NR_umount2, "/proc", MNT_DETACH);
}

/* What the daemon ignored (nohup's SIGHUP, say) must not reach the jobs. */
static void reset_signals(void)
{
	struct {
		void *handler;
		unsigned long flags;
		void *restorer;
		uint64_t mask;
	} default_action = {0};
	for (int signal = 1; signal <= 64; signal++)
		call(__NR_rt_sigaction, signal, &default_action, 0, sizeof default_action.mask);
}

static void set_up_scratch(void)
{
	long at = call(__NR_mmap, SCRATCH_ADDRESS, SCRATCH_BYTES, PROT_READ | PROT_WRITE | PROT_EXEC,
	               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	if (at < 0)
		fail(at);
}

static _Noreturn void run_as_init(void)
{
	call(__NR_prctl, PR_SET_PDEATHSIG, SIGKILL);
	mount_proc();
	set_up_scratch();
	open_block();
	open_orders();
	call(__NR_fcntl, report_fd, F_SETFD, FD_CLOEXEC);
	call(__NR_fcntl, report_fd, F_SETOWN, own_pid());
	call(__NR_fcntl, report_fd, F_SETFL, O_RDWR | FASYNC);
	struct report report = {.kind = REPORT_READY, .pid = 1, .reporter = 1, .code = last_pid_fd >= 0};
	send_report(&report);
	end_without_daemon();
	loop();
}

static _Noreturn void begin_as_init(char **argv, char **envp)
{
	call(__NR_setsid, 0);
	call(__NR_chdir, "/");
	call(__NR_umask, 0);
	reset_signals();
	set_up_mounts();
	move_to_hidden_program(argv, envp);
	run_as_init();
}

static int starts_with(const char *text, const char *prefix)
{
	while (*prefix)
		if (*text++ != *prefix++)
			return 0;
	return 1;
}

/* A placeholder that was to become the process it stands for, and has not: it is run anew. */
static int again;

static _Noreturn void run_as_placeholder(void)
{
	call(__NR_close_range, 0, report_fd - 1, 0);
	call(__NR_close_range, report_fd + 1, ~0U, 0);
	call(__NR_fcntl, report_fd, F_SETFD, FD_CLOEXEC);
	call(__NR_prctl, PR_SET_PDEATHSIG, 0);
	call(__NR_prctl, PR_SET_DUMPABLE, 0);
	set_up_scratch();
	report_children(); /* of a job that has left: what they did before is signalled no more */
	loop();
}

static int read_arguments(long *stack)
{
	char **argv = (char **)(stack + 1);
	if (stack[0] != 4)
		return 0;
	report_fd = text_to_int(argv[1]);
	first_pid = text_to_int(argv[2]);
	end_pid = text_to_int(argv[3]);
	for (char **env = argv + 5; *env; env++)
		if (starts_with(*env, "BPFS_COOKIE="))
			cookie = (uint32_t)hex_to_u64(*env + 12);
		else if (starts_with(*env, "BPFS_PLACEHOLDER="))
			again = 1;
		else if (starts_with(*env, "BPFS_ROOT="))
			root = *env + 10;
		else if (starts_with(*env, "BPFS_CLOCKS="))
			clocks = *env + 12;
	return cookie != 0;
}

/* With rights that its file gave it, it works for a daemon of root's only. */
static int may_run(void)
{
	struct {
		int32_t pid;
		uint32_t uid, gid;
	} peer = {0, ~0U, ~0U};
	int32_t size = sizeof peer;
	if (call(__NR_geteuid, 0) == call(__NR_getuid, 0))
		return 1;
	return !call(__NR_getsockopt, report_fd, SOL_SOCKET_, SO_PEERCRED_, &peer, &size) && peer.uid == 0;
}

/* Children of this process get clocks of their own. Where the kernel has no such namespaces, they have the node's: the
 * daemon sees that for itself. */
static void set_clocks(void)
{
	if (!clocks || call(__NR_unshare, CLONE_NEWTIME) < 0)
		return;
	long length = 0;
	while (clocks[length])
		length++;
	long fd = call(__NR_open, "/proc/self/timens_offsets", O_WRONLY | O_CLOEXEC, 0);
	long done = fd < 0 ? fd : call(__NR_write, fd, clocks, length);
	if (done != length)
		fail(done < 0 ? done : -EIO);
	call(__NR_close, fd);
}

/* The daemon becomes the parent (CLONE_PARENT): it gets the exit status, and its death counts. */
__attribute__((used)) _Noreturn void start(long *stack)
{
	uint64_t every = EVERY_SIGNAL;
	char **argv = (char **)(stack + 1), **envp = argv + 5;
	if (!read_arguments(stack) || !may_run())
		end(2);
	call(__NR_rt_sigprocmask, SIG_BLOCK, &every, 0, sizeof every);
	call(__NR_prctl, PR_SET_NAME, "nodeinit");
	if (again)
		run_as_placeholder();
	if (own_pid() == 1)
		run_as_init();
	set_clocks();
	own_program = call(__NR_open, "/proc/self/exe", O_RDONLY | O_CLOEXEC, 0);
	/* Ids of System V's are the cluster's own, too; a kernel may have no such namespaces. */
	long pid = call(__NR_clone, CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
	if (pid == -EINVAL)
		pid = call(__NR_clone, CLONE_NEWPID | CLONE_NEWNS | CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
	if (pid == 0)
		begin_as_init(argv, envp);
	if (pid < 0)
		fail(pid);
	struct report report = {.kind = REPORT_BORN, .pid = (int32_t)pid};
	send_report(&report);
	end(0);
}

ENTRY(start)
