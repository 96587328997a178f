/* ghost_child.c - ghosts of what the job has forked on its node: made as children of this one, and who they are.
 *
 * A child's ghost is a clone that starts over: it keeps nothing of its parent's but the session's terminal. It needs
 * no stream, for the real child inherited the ends that its parent has on the node.
 */
#define _GNU_SOURCE
#include "ghost.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define ARGUMENTS_MAX 4096

/* ---- names and ids ---- */

/* stat has the bounds that the kernel wants to be told again; all others stay. That of /proc/self may be covered by what
 * the real process is (covers.py). */
static bool read_bounds(struct prctl_mm_map *map)
{
	char text[1024];
	unsigned long long field[53] = { 0 };
	int fd = open("/proc/thread-self/stat", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

	if (fd >= 0)
		close(fd);
	if (n <= 0)
		return false;
	text[n] = 0;
	char *at = strrchr(text, ')');
	if (!at || !at[1])
		return false;
	at += 3;
	for (int i = 4; i <= 52; i++)
		field[i] = strtoull(at, &at, 10);
	map->start_code = field[26];
	map->end_code = field[27];
	map->start_stack = field[28];
	map->start_data = field[45];
	map->end_data = field[46];
	map->start_brk = field[47];
	map->arg_start = field[48];
	map->arg_end = field[49];
	map->env_start = field[50];
	map->env_end = field[51];
	map->brk = (uint64_t)(uintptr_t)sbrk(0);
	map->exe_fd = (uint32_t)-1;
	return true;
}

/* The command line that /proc/PID/cmdline shows. */
void show_arguments(const char *text, size_t length)
{
	static char *shown;
	struct prctl_mm_map map = { 0 };

	if (!length)
		return;
	if (!shown)
		shown = mmap(NULL, ARGUMENTS_MAX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (shown == MAP_FAILED) {
		shown = NULL;
		return;
	}
	if (length > ARGUMENTS_MAX - 1)
		length = ARGUMENTS_MAX - 1;
	memcpy(shown, text, length);
	shown[length] = 0;
	if (!read_bounds(&map))
		return;
	map.arg_start = (uint64_t)(uintptr_t)shown;
	map.arg_end = map.arg_start + length;
	prctl(PR_SET_MM, PR_SET_MM_MAP, &map, sizeof(map), 0);
}

/* Only root's ghosts can take another user's ids; a user's own are right from the beginning. */
void take_ids(int sid, int pgid, uint32_t uid, uint32_t gid)
{
	if (sid == getpid() && getsid(0) != sid)
		setsid();
	if (pgid > 0 && getpgid(0) != pgid)
		setpgid(0, pgid);
	if (uid == getuid() && gid == getgid())
		return;
	if (getuid() == 0 && uid != 0)
		setgroups(0, NULL);
	if (syscall(SYS_setresgid, gid, gid, gid) == 0 && syscall(SYS_setresuid, uid, uid, uid) == 0)
		prctl(PR_SET_DUMPABLE, 1);
}

/* ---- death ---- */

#define KEPT_MAX 1000

static pid_t kept[KEPT_MAX]; /* see keep() */
static int kept_count;
static pid_t *owed; /* were waited for on the node, and have not ended here yet */
static int owed_count, owed_room;

static bool has_reaped(pid_t pid)
{
	pid_t group = getpgid(pid);

	if (waitpid(pid, NULL, WNOHANG | __WALL) == 0)
		return false;
	ttys_left(group, false);
	return true;
}

void reap_owed(void)
{
	for (int i = owed_count - 1; i >= 0; i--)
		if (has_reaped(owed[i]))
			owed[i] = owed[--owed_count];
}

/* The real parent, on its node, has waited for this one. */
void reap(pid_t pid)
{
	for (int i = kept_count - 1; i >= 0; i--)
		if (kept[i] == pid)
			kept[i] = kept[--kept_count];
	if (has_reaped(pid))
		return;
	if (owed_count == owed_room) {
		owed_room = owed_room ? owed_room * 2 : 16;
		owed = realloc(owed, owed_room * sizeof(*owed));
		if (!owed)
			_exit(255);
	}
	owed[owed_count++] = pid;
}

/* ---- children that stayed here when their parent left ---- */

/* Their parent, on its node, waits for what stands for them there; here they stay zombies until it has. */
void look_at_kept(void)
{
	for (int i = kept_count - 1; i >= 0; i--) {
		siginfo_t info = { 0 };

		while (waitid(P_PID, kept[i], &info, WSTOPPED | WCONTINUED | WNOHANG) == 0 && info.si_pid) {
			tell(C_CHILD, kept[i], info.si_code, info.si_status, 0, 0);
			info.si_pid = 0;
		}
		if (waitid(P_PID, kept[i], &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid) {
			tell(C_CHILD, kept[i], info.si_code, info.si_status, 0, 0);
			kept[i] = kept[--kept_count];
		}
	}
}

static void keep_one(pid_t pid)
{
	for (int i = 0; i < kept_count; i++)
		if (kept[i] == pid)
			return;
	if (kept_count < KEPT_MAX)
		kept[kept_count++] = pid;
}

void keep(const struct ctl *m, size_t text)
{
	int count = text / sizeof(*kept);
	pid_t pid;

	if (!m->a)
		kept_count = 0;
	for (int i = 0; i < count; i++) {
		memcpy(&pid, m->text + i * sizeof(pid), sizeof(pid));
		keep_one(pid);
	}
	look_at_kept();
}

/* ---- birth ---- */

static long clone_as(pid_t pid)
{
	struct clone_args args = {
		.exit_signal = SIGCHLD, .set_tid = (uint64_t)(uintptr_t)&pid, .set_tid_size = 1,
	};

	return syscall(SYS_clone3, &args, sizeof(args));
}

/* The C library's fork is told of the middle process; its clone is not, and knows its number by getpid only. */
static long clone_orphan(pid_t pid)
{
	int status = 0;
	pid_t middle = fork();

	if (middle < 0)
		return -1;
	if (middle == 0) {
		long made = clone_as(pid);
		if (made == 0)
			return 0;
		_exit(made < 0 ? errno : 0);
	}
	while (waitpid(middle, &status, 0) < 0 && errno == EINTR)
		;
	errno = WIFEXITED(status) ? WEXITSTATUS(status) : EAGAIN;
	return errno ? -1 : pid;
}

/* Text: the name's 16 bytes, then the arguments. */
void bear(const struct ctl *m, size_t text, int fd)
{
	struct birth b;

	if (fd < 0 || text < sizeof(b)) {
		tell(C_BORN, m->a, EINVAL, 0, 0, 0);
		return;
	}
	memcpy(&b, m->text, sizeof(b));
	long made = b.orphan ? clone_orphan(m->a) : clone_as(m->a);
	if (made != 0) {
		int error = made < 0 ? errno : 0;
		close(fd);
		/* If that was sent to the group before, it has not found the child. */
		tell(C_BORN, m->a, error, barrier.what == B_CONT || cont_pending(), 0, 0);
		return;
	}
	owed_count = kept_count = 0;
	/* Where the environment, which the child has as well, says that it is: the engine looks there on the way home. */
	if (fd != control.fd && dup2(fd, control.fd) >= 0)
		fd = control.fd;
	if (fd > 0)
		syscall(SYS_close_range, 0, fd - 1, 0);
	syscall(SYS_close_range, fd + 1, ~0u, 0);
	b.comm[sizeof(b.comm) - 1] = 0;
	prctl(PR_SET_NAME, b.comm);
	show_arguments(m->text + sizeof(b), text - sizeof(b));
	take_ids(m->c, m->b, b.uid, b.gid);
	start_over(fd, b.terminal);
}
