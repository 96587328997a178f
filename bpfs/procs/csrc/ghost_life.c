/* ghost_life.c - how the ghost stops, goes on and ends, each after the output that came before it. */
#define _GNU_SOURCE
#include "ghost.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#define BARRIER_MS 300         /* most a stop or continue waits for output to come through to who reads it here */
#define READER_MS 100          /* at the end: without progress so long, a slow reader is left to a child */
#define NETWORK_MS 2000        /* most that a node takes to answer, and, at the end, most without any progress */
#define ORPHAN_MS 5            /* who was not even stopped so long is in an orphaned group, which the kernel does not stop */

struct barrier barrier;

/* ---- the end ---- */

static void die(int signo)
{
	struct rlimit none = { 0, 0 };
	sigset_t set;

	if (!barrier.core)
		setrlimit(RLIMIT_CORE, &none);
	else
		core_prepare();
	signal(signo, SIG_DFL);
	sigemptyset(&set);
	sigaddset(&set, signo);
	signal_self(signo);
	sigprocmask(SIG_UNBLOCK, &set, NULL);
	_exit(128 + signo); /* its default is not to end: no such status exists */
}

/* The ghost ends now; what is still owed to readers, or comes from children of the job, a child pumps on. */
static void become_pump(void)
{
	sigset_t set;

	pumping = true;
	drop_rights();
	prctl(PR_SET_NAME, "bpfs-pump");
	close(control.fd);
	close(signals.fd);
	heir_close();
	control.fd = signals.fd = -1;
	sigfillset(&set);
	sigdelset(&set, SIGTERM);
	sigprocmask(SIG_SETMASK, &set, NULL);
	the_stream.tcp.listed = false; /* the old epoll set is shared with the dead */
	for (int i = 0; i < the_stream.nchans; i++)
		the_chans[i].src.listed = the_chans[i].sink.listed = false;
	loop_init();
	stream_mark(&the_stream);
}

static void end_now(void)
{
	if ((!all_written() || any_alive()) && fork() == 0) {
		become_pump();
		return;
	}
	if (all_written() && !any_alive()) {
		frame_put(&the_stream, F_BYE, 0, NULL, 0);
		stream_service(&the_stream);
	}
	if (barrier.killed)
		die(barrier.number);
	_exit(barrier.number);
}

void pump_check(void)
{
	if (!all_written() || any_alive())
		return;
	frame_put(&the_stream, F_BYE, 0, NULL, 0);
	stream_service(&the_stream);
	_exit(0);
}

/* ---- stop and continue ---- */

static void stop_now(int signo)
{
	sigset_t set;

	tell(C_STOPPED, signo, 0, 0, 0, 0);
	sigemptyset(&set);
	sigaddset(&set, signo);
	signal(signo, SIG_DFL);
	signal_self(signo);
	sigprocmask(SIG_UNBLOCK, &set, NULL); /* stops here */
	sigprocmask(SIG_BLOCK, &set, NULL);
	tell(C_CONTINUED, 0, 0, 0, 0, 0);
	ttys_refresh(true);
}

void barrier_start(enum barrier_what what, int number)
{
	if (barrier.what == B_CONT)
		forward(&barrier.info);
	barrier.what = what;
	barrier.number = number;
	barrier.token++;
	barrier.drained = !the_stream.open || the_stream.held;
	barrier.deadline = now_ms() + (what != B_END ? BARRIER_MS : all_written() ? NETWORK_MS : READER_MS);
	if (!barrier.drained) {
		uint32_t why = what == B_END ? DRAIN_END : what == B_STOP ? DRAIN_STOP : DRAIN_CONT;
		uint32_t data[3] = { barrier.token, why, getpgrp() };
		frame_put(&the_stream, F_DRAIN, 0, data, sizeof(data));
	}
}

/* Going on before its group is in front there, it would be stopped at once, by its next read: so a busy node is waited for. */
int64_t barrier_until(void)
{
	return barrier.deadline + (barrier.what == B_CONT && !barrier.drained ? NETWORK_MS - BARRIER_MS : 0);
}

/* Under TOSTOP a local job could not have ended before its last words were out: it would stand still in its write. */
static bool stopped_for_output(void)
{
	int64_t before = now_ms();

	if (barrier.what != B_END || barrier.killed || !ttys_barred())
		return false;
	stop_now(SIGTTOU);
	if (now_ms() - before < ORPHAN_MS)
		return false;
	barrier.deadline = now_ms() + NETWORK_MS;
	return true;
}

void barrier_check(void)
{
	bool written = all_written();

	if (barrier.what == B_NONE || stopped_for_output())
		return;
	if (!the_stream.open)
		barrier.drained = true;
	if (barrier.what == B_END && the_stream.progress)
		barrier.deadline = now_ms() + (written ? NETWORK_MS : READER_MS);
	if (!(barrier.drained && written) && now_ms() < barrier_until())
		return;
	switch (barrier.what) {
	case B_STOP:
		barrier.what = B_NONE;
		if (!cont_pending()) /* else the user has continued it in the meantime */
			stop_now(barrier.number);
		break;
	case B_CONT:
		barrier.what = B_NONE;
		forward(&barrier.info);
		break;
	default:
		barrier.what = B_NONE;
		end_now();
	}
}
