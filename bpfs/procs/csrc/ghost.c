/* ghost - stands on the master in the place of a process that runs on a node.
 *
 * It is exec'd inside the very process that left: same pid, parent, group, session and terminal, all descriptors
 * open, all signals blocked. It forwards signals, relays the job's terminals, pipes and sockets over the stream,
 * stops and continues with the real process, and ends with its very status. Environment: BPFS_CONTROL (number of the
 * SEQPACKET socket to bpmaster), BPFS_LEASE (seconds to go on without it), BPFS_HEIR (digits in which to say where the
 * next master finds it: ghost_heir.c), BPFS_DEATHSIG (PR_SET_PDEATHSIG of the process, which the exec of a program with
 * capabilities clears).
 */
#define _GNU_SOURCE
#include "ghost.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define FOREGROUND_TICK_MS 250 /* a background job that is put in front without SIGCONT learns it by this */

struct port control, signals;
static int64_t lease_ends = -1; /* set once the master is gone */
static int lease_seconds;
static pid_t master_pid;
static int conts_told; /* SIGCONTs, to this master */
static bool announced_cont; /* C_CONT came: the next SIGCONT of the master's is not the user's */
bool pumping;        /* this is a child that only pumps; the ghost has ended */
static bool typed_there; /* the real process has the session's terminal on its node: the kernel there sends what is typed */
static jmp_buf beginning;
static int handed_control = -1; /* in a clone: its control socket */

static int streams; /* how many C_STREAM came from this master */
static int stream_number; /* of the last one */
static bool hold_asked, hold_home;
static int64_t hold_deadline; /* C_HELD goes out when all is written, or then */

/* What may be lost with a master that dies before it has dealt with it. */
#define UNSEEN_MOST 256
static struct { _Alignas(struct ctl) uint8_t head[CTL_HEAD]; } unseen[UNSEEN_MOST];
static unsigned told, seen;    /* of all */
static unsigned counted_from; /* where this master began to count */

static void say(const void *head)
{
	if (control.fd >= 0) /* without a master nobody reads: it waits there, or is too much */
		send(control.fd, head, CTL_HEAD, MSG_NOSIGNAL | (lease_ends < 0 ? 0 : MSG_DONTWAIT));
}

void tell(uint32_t type, int a, int b, int c, int d, uint64_t value)
{
	struct ctl m = { .type = type, .a = a, .b = b, .c = c, .d = d, .value = value };

	if (type == C_SIGNAL || type == C_CHILD)
		memcpy(&unseen[told++ % UNSEEN_MOST], &m, CTL_HEAD);
	conts_told += type == C_SIGNAL && a == SIGCONT;
	say(&m);
}

static void tell_again(void)
{
	unsigned first = told - seen > UNSEEN_MOST ? told - UNSEEN_MOST : seen;

	conts_told = 0;
	for (unsigned i = first; i != told; i++) {
		const struct ctl *m = (const void *)&unseen[i % UNSEEN_MOST];

		conts_told += m->type == C_SIGNAL && m->a == SIGCONT;
		say(m);
	}
	seen = first;
}

void forward(const struct signalfd_siginfo *i)
{
	tell(C_SIGNAL, i->ssi_signo, i->ssi_code, i->ssi_pid, i->ssi_uid, i->ssi_ptr);
}

/* ---- signals ---- */

/* The terminal's settings shall be there before the job goes on. */
static void start_continuing(const struct signalfd_siginfo *i)
{
	ttys_refresh(true);
	barrier_start(B_CONT, SIGCONT);
	barrier.info = *i;
}

static void one_signal(const struct signalfd_siginfo *i)
{
	int n = i->ssi_signo;
	bool kernel = i->ssi_code == SI_KERNEL;

	if ((pid_t)i->ssi_pid == getpid() && n == SIGPIPE)
		return; /* our own write to a closed pipe */
	if (n == SIGCHLD && i->ssi_code > 0) { /* children's ghosts; the real ones' ends are told where they live */
		reap_owed();
		look_at_kept();
		if (i->ssi_code == CLD_STOPPED) {
			ttys_left(getpgid(i->ssi_pid), true);
			tell(C_CHILD_STOPPED, i->ssi_pid, 0, 0, 0, 0);
		}
		return;
	}
	if (n == SIGWINCH && kernel && the_stream.open) {
		ttys_winsize();
		return;
	}
	if (kernel && typed_there && n != SIGCONT)
		return;
	if (kernel && (n == SIGINT || n == SIGQUIT || n == SIGTSTP) && ttys_signal(n))
		return;
	if (n != SIGCONT) {
		if (barrier.what == B_CONT) { /* else this one would overtake it */
			barrier.what = B_NONE;
			forward(&barrier.info);
		}
		forward(i);
		return;
	}
	if (announced_cont && (pid_t)i->ssi_pid == master_pid) {
		announced_cont = false;
		return;
	}
	if (barrier.what == B_END)
		return;
	start_continuing(i);
}

/* Did the user continue it just now? The SIGCONT that the master has announced, and that may be unread yet, is no such thing. */
bool cont_pending(void)
{
	struct timespec none = { 0, 0 };
	sigset_t set;
	siginfo_t info;

	if (sigpending(&set) < 0 || !sigismember(&set, SIGCONT))
		return false;
	sigemptyset(&set);
	sigaddset(&set, SIGCONT);
	if (!announced_cont || sigtimedwait(&set, &info, &none) != SIGCONT)
		return true;
	struct signalfd_siginfo i = {
		.ssi_signo = SIGCONT, .ssi_code = info.si_code, .ssi_pid = info.si_pid, .ssi_uid = info.si_uid,
		.ssi_ptr = (uint64_t)(uintptr_t)info.si_value.sival_ptr,
	};
	bool users = info.si_pid != master_pid;
	one_signal(&i);
	return users;
}

static void control_event(struct port *p, uint32_t events);

static void signal_event(struct port *p, uint32_t events)
{
	struct signalfd_siginfo info;
	char c;

	(void)events;
	/* What the master said before it sent a signal shall be known before the signal is. */
	while (control.fd >= 0 && recv(control.fd, &c, 1, MSG_PEEK | MSG_DONTWAIT) >= 0)
		control_event(&control, 0);
	while (read(p->fd, &info, sizeof(info)) == sizeof(info))
		one_signal(&info);
}

/* ---- the stream ---- */

void side_lost(struct stream *s, int err)
{
	(void)s;
	if (!pumping)
		tell(C_STREAM_LOST, err, streams, 0, 0, 0);
	if (hold_asked)
		hold_asked = false;
}

void side_serviced(struct stream *s)
{
	for (int i = 0; i < s->nchans; i++)
		if (the_chans[i].tty)
			tty_settle(&the_chans[i]);
}

static void hold_done(void)
{
	for (int i = 0; i < the_stream.nchans; i++)
		the_chans[i].granted = 0;
	hold_asked = false;
	hold_deadline = now_ms() + 50;
}

static void hold_check(void)
{
	int pumps = 0;

	if (!hold_deadline || (!all_written() && now_ms() < hold_deadline))
		return;
	hold_deadline = 0;
	uint64_t kept = take_held(hold_home, &pumps);
	tell(C_HELD, pumps, 0, 0, 0, kept);
}

bool side_frame(struct stream *s, const struct frame *h, const uint8_t *data)
{
	struct chan *c = chan_find(s, h->chan);
	uint32_t value = 0;

	if (h->len >= sizeof(value))
		memcpy(&value, data, sizeof(value));
	switch (h->type) {
	case F_DRAINED:
		if (value == barrier.token)
			barrier.drained = true;
		return true;
	case F_HELD:
		if (hold_asked)
			hold_done();
		return true;
	case F_NOSIG:
		tell(C_SIGNAL, value, SI_KERNEL, 0, 0, 0);
		return true;
	}
	if (!c || !c->tty)
		return false;
	switch (h->type) {
	case F_WANT:
		tty_want(c, value);
		return true;
	case F_TERMIOS:
		if (h->len != sizeof(struct kernel_termios))
			return false;
		tty_set(c, (const struct kernel_termios *)data);
		return true;
	case F_FLUSH:
		tty_discard(c);
		return true;
	case F_SYNC:
		tty_sync(c, value);
		return true;
	case F_NATIVE:
		c->tty->native = true;
		return true;
	}
	return false;
}

static void hold(bool home)
{
	hold_home = home;
	if (!the_stream.open) {
		hold_deadline = now_ms();
		return;
	}
	hold_asked = true;
	the_stream.held = true;
	for (int i = 0; i < the_stream.nchans; i++)
		the_chans[i].granted = HOLD_MAX;
	frame_put(&the_stream, F_HOLD, 0, NULL, 0);
}

static void resume(void)
{
	hold_asked = false;
	hold_deadline = 0;
	the_stream.held = false;
	frame_put(&the_stream, F_RESUME, 0, NULL, 0);
	stream_grant_all();
	ttys_greet();
}

static void new_stream(int fd, const struct ctl *m, size_t len)
{
	struct frame bye = { .type = F_BYE };
	int high = fd >= 0 ? high_fd(fd) : -1;

	streams++;
	stream_number = m->a;
	if (fd >= 0)
		close(fd);
	if (the_stream.open) {
		if (!the_stream.splice_left && (!the_stream.tx.len || the_stream.held))
			send(the_stream.tcp.fd, &bye, sizeof(bye), MSG_NOSIGNAL | MSG_DONTWAIT);
		the_stream.open = false; /* on purpose: not a loss */
		port_close(&the_stream.tcp);
		buf_free(&the_stream.tx);
		if (the_stream.way[0] >= 0) {
			close(the_stream.way[0]);
			close(the_stream.way[1]);
		}
	}
	hold_asked = false;
	if (high < 0 || stream_table((const uint8_t *)m->text, len)) {
		tell(C_STREAM_LOST, EINVAL, streams, 0, 0, 0);
		return;
	}
	stream_init(&the_stream, high);
	for (int i = 0; i < the_stream.nchans; i++) {
		struct chan *c = &the_chans[i];

		c->credit = c->moved = 0;
		c->draining = false;
		if (c->src.fd >= 0)
			c->eof_sent = false;
	}
	ttys_greet();
	stream_grant_all();
}

/* ---- control ---- */

/* siginfo then has the pid and user of the real process, which are ours. */
static int send_signal(int pid, int signo, int code, uint64_t value)
{
	union sigval with = { .sival_ptr = (void *)(uintptr_t)value };

	if (code == SI_QUEUE)
		return sigqueue(pid, signo, with);
	if (code == SI_TKILL)
		return syscall(SYS_tgkill, pid, pid, signo);
	return kill(pid, signo);
}

/* Whether the real process may is the kernel's to say, as on one machine. */
static void strike(const struct ctl *m, size_t text)
{
	int sent = 0, error = ESRCH;
	pid_t pid;

	for (size_t i = 0; i + sizeof(pid) <= text; i += sizeof(pid)) {
		memcpy(&pid, m->text + i, sizeof(pid));
		if (send_signal(pid, m->a, m->b, m->value) == 0)
			sent++;
		else if (errno != ESRCH)
			error = errno;
	}
	tell(C_STRUCK, sent, error, 0, 0, 0);
}

/* A new master. Whether what the last one was about to do with the job has been done, it has still to find out: a stream
 * that is held stays so until it says. */
static void adopted(pid_t by)
{
	master_pid = by;
	lease_ends = -1;
	announced_cont = false;
	streams = 0;
	heir_taken();
	tell(C_ADOPTED, the_stream.open ? stream_number : 0, the_stream.open && the_stream.held, 0, 0, 0);
}

static void orphaned(void)
{
	int number = control.fd;

	port_close(&control); /* the job may go on for one lease */
	lease_ends = now_ms() + lease_seconds * 1000;
	int fd = heir_follow(number);
	if (fd < 0)
		return;
	port_open(&control, fd, control_event, NULL);
	port_want(&control, EPOLLIN);
	tell_again();
	counted_from = seen;
}

static void obey(const struct ctl *m, size_t text, int fd)
{
	char name[16] = "";

	switch (m->type) {
	case C_FORK:
		bear(m, text, fd);
		break;
	case C_KEEP:
		keep(m, text);
		break;
	case C_SEND:
		send_signal(m->a, m->b, m->c, m->value);
		break;
	case C_STRIKE:
		strike(m, text);
		break;
	case C_REAP:
		reap(m->a);
		break;
	case C_IDS:
		take_ids(m->a, m->b, m->c, m->d);
		break;
	case C_ARGUMENTS:
		show_arguments(m->text, text);
		break;
	case C_NAME:
		memcpy(name, m->text, text < 15 ? text : 15);
		prctl(PR_SET_NAME, name);
		break;
	case C_STREAM:
		new_stream(fd, m, text);
		break;
	case C_HOLD:
		hold(m->a);
		break;
	case C_RESUME:
		resume();
		break;
	case C_PUMP:
		tell(C_PUMPED, pump_all(), 0, 0, 0, 0);
		break;
	case C_EXIT:
	case C_KILLED:
		if (the_stream.open && the_stream.held)
			resume(); /* else what is left of the output would never come, nor its end */
		barrier.killed = m->type == C_KILLED;
		barrier.core = m->type == C_KILLED && m->b;
		barrier_start(B_END, m->a);
		break;
	case C_STOP:
		/* The user's SIGCONT, which the job is about to get, comes after any stop. */
		if (barrier.what == B_END || barrier.what == B_CONT || cont_pending() || m->b != conts_told)
			break;
		if (ttys_stop_is_stale(m->a)) {
			struct signalfd_siginfo own = { .ssi_signo = SIGCONT, .ssi_pid = getpid(), .ssi_uid = getuid() };

			start_continuing(&own);
		} else {
			barrier_start(B_STOP, m->a);
		}
		break;
	case C_SEEN:
		seen = counted_from + m->a;
		break;
	case C_CONT:
		announced_cont = true;
		if (barrier.what == B_STOP) {
			barrier.what = B_NONE;
			ttys_refresh(true);
		}
		break;
	}
}

static void control_event(struct port *p, uint32_t events)
{
	struct ctl m;
	struct ucred sender = { .uid = (uid_t)-1 };
	union {
		char space[CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
		struct cmsghdr align;
	} anc;
	struct iovec v = { &m, sizeof(m) };
	struct msghdr h = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = &anc, .msg_controllen = sizeof(anc) };
	int fd = -1;
	ssize_t r = recvmsg(p->fd, &h, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	(void)events;
	/* Reset: the master died with something unread; what it said itself may still be here. */
	if (r < 0 && (errno == EAGAIN || errno == EINTR || errno == ECONNRESET))
		return;
	for (struct cmsghdr *c = r > 0 ? CMSG_FIRSTHDR(&h) : NULL; c; c = CMSG_NXTHDR(&h, c)) {
		if (c->cmsg_type == SCM_RIGHTS)
			memcpy(&fd, CMSG_DATA(c), sizeof(fd));
		if (c->cmsg_type == SCM_CREDENTIALS)
			memcpy(&sender, CMSG_DATA(c), sizeof(sender));
	}
	if (r < (ssize_t)CTL_HEAD) {
		orphaned();
		return;
	}
	if (m.type == C_ADOPT && sender.uid == 0)
		adopted(sender.pid);
	else
		obey(&m, r - CTL_HEAD, fd);
	stream_mark(&the_stream);
}

static int number(const char *name, int otherwise)
{
	const char *text = getenv(name);

	return text && *text ? atoi(text) : otherwise;
}

static int64_t wait_us(void)
{
	int64_t next = INT64_MAX, now = now_ms();

	if (pumping)
		return 1000 * MS;
	if (barrier.what != B_NONE)
		next = barrier_until();
	if (hold_deadline && hold_deadline < next)
		next = hold_deadline;
	if (lease_ends >= 0 && lease_ends < next)
		next = lease_ends;
	if (ttys_in_background() && now + FOREGROUND_TICK_MS < next)
		next = now + FOREGROUND_TICK_MS;
	if (next == INT64_MAX)
		return -1;
	return next <= now ? 0 : (next - now) * MS;
}

/* capset(2), without the kernel's headers: two sets of 32 capabilities each. */
struct cap_head { uint32_t version; int pid; };
struct cap_sets { uint32_t effective, permitted, inheritable; };
#define CAP_VERSION_3 0x20080522u
#define CAP_CHECKPOINT_RESTORE_HIGH (1u << 8) /* capability 40, in the second set */

/* An ordinary user's ghost may be given capabilities by its program's file (engine/ghosting.py), for the way home. All
 * that it uses itself is the one that lets it choose pids and its executable. */
static void take_rights(void)
{
	struct cap_head head = { .version = CAP_VERSION_3 };
	struct cap_sets sets[2];

	if (syscall(SYS_capget, &head, sets) < 0)
		return;
	sets[1].effective |= sets[1].permitted & CAP_CHECKPOINT_RESTORE_HIGH;
	syscall(SYS_capset, &head, sets);
}

/* What outlives the ghost has no use for them. */
void drop_rights(void)
{
	struct cap_head head = { .version = CAP_VERSION_3 };
	struct cap_sets none[2] = { 0 };

	if (getauxval(AT_SECURE))
		syscall(SYS_capset, &head, none);
}

/* Not raise(3): in a clone the C library takes itself for its parent. */
void signal_self(int signo)
{
	pid_t self = getpid();

	syscall(SYS_tgkill, self, self, signo);
}

void start_over(int control_fd, bool has_terminal)
{
	the_stream = (struct stream){ .tcp.fd = -1, .way = { -1, -1 } };
	loop_forget();
	heir_forget();
	memset(&barrier, 0, sizeof(barrier));
	control.fd = signals.fd = -1;
	announced_cont = hold_asked = hold_home = false;
	told = seen = counted_from = conts_told = 0;
	hold_deadline = 0;
	lease_ends = -1;
	typed_there = has_terminal;
	handed_control = control_fd;
	longjmp(beginning, 1);
}

int main(void)
{
	struct ucred peer = { 0 };
	socklen_t size = sizeof(peer);
	sigset_t all;
	int fd;

	if (setjmp(beginning))
		fd = handed_control;
	else
		fd = number("BPFS_CONTROL", -1);
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	/* Whoever came to a program with rights by himself is not root, and gets nothing of it. */
	if (fd < 0 || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 || (getauxval(AT_SECURE) && peer.uid)) {
		static const char usage[] = "ghost: started by bpmaster only: no BPFS_CONTROL socket\n";
		return write(2, usage, sizeof(usage) - 1) < 0 ? 2 : 2;
	}
	master_pid = peer.pid;
	take_rights();
	prctl(PR_SET_PDEATHSIG, number("BPFS_DEATHSIG", 0));
	lease_seconds = number("BPFS_LEASE", 30);
	loop_init();
	fcntl(fd, F_SETFD, FD_CLOEXEC);
	port_open(&control, fd, control_event, NULL);
	fd = signalfd(-1, &all, SFD_NONBLOCK | SFD_CLOEXEC);
	port_open(&signals, high_fd(fd), signal_event, NULL);
	close(fd);
	port_want(&control, EPOLLIN);
	port_want(&signals, EPOLLIN);
	heir_make();
	tell(C_READY, 0, 0, 0, 0, 0);
	for (;;) {
		the_stream.progress = false;
		if (loop_once(wait_us()) && !pumping)
			tell(C_INTERRUPTED, 0, 0, 0, 0, 0);
		if (pumping) {
			pump_check();
			continue;
		}
		hold_check();
		barrier_check();
		if (ttys_in_background())
			ttys_refresh(false);
		if (lease_ends >= 0 && now_ms() >= lease_ends)
			kill(getpid(), SIGKILL);
	}
}
