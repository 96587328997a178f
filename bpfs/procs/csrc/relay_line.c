/* relay_line.c - a terminal of this node that several jobs share: the jobs of one session have one controlling
 * terminal, and here it is one pseudo-terminal, a *line*. Each job has a *seat* at it: its own stream to its own ghost.
 *
 * Output. Who wrote what comes out of a pseudo-terminal cannot be told, nor need be: all ghosts of the session write to
 * the same real terminal. One seat is the *speaker*, whose ghost writes it: the one in the foreground where there is one,
 * for a ghost that stops takes with it what it has not written. So that nothing overtakes, the speaker changes
 * only when the old one's ghost has said that all is written (F_SYNC, F_SYNCED). A job that is to stop, end or move
 * waits in the same way for what it has written through another's ghost.
 *
 * Foreground. The line's foreground group is kept as the real terminal's is, or is the session leader's where that group
 * has no member here: the kernel then does what it does to background jobs. Only a process of the session can set it,
 * so bpslave has the leader's placeholder do it (C_FRONT, C_FRONTED).
 */
#define _GNU_SOURCE
#include "relay.h"

#include <stdlib.h>
#include <unistd.h>

#define READ_US (50 * MS)      /* most that a drain through another's stream goes on reading */
#define SYNC_US (300 * MS)     /* a speaker that has not even said "not yet" by then is stopped or stuck */
#define LISTEN_US (100 * MS)   /* what a speaker in the background was given is asked after that */
#define SETTLE_US (1500 * MS)  /* the leader's placeholder takes some 0.1 ms; it is bpslave that may be gone */

static struct line *lines;
static int orders; /* given to bpslave */

static bool is_open(const struct tty *t)
{
	return t->chan->stream->open && t->chan->src.fd >= 0;
}

static bool can_speak(const struct tty *t)
{
	return is_open(t) && !t->asleep && !t->chan->stream->held;
}

static struct tty *front(const struct line *l)
{
	if (l->owner && l->owner->group && !l->owner->over && can_speak(l->owner))
		return l->owner;
	for (struct tty *t = l->seats; t; t = t->next)
		if (t->group && !t->over && can_speak(t))
			return t;
	return NULL;
}

bool line_in_front(const struct tty *t)
{
	const struct tty *f = front(t->line);

	return f ? f == t : !t->line->seats->next;
}

/* Another seat of the same group does what both their ghosts are asked for: signals typed, keys. */
bool line_is_second(const struct tty *t)
{
	const struct tty *f = front(t->line);

	return f && f != t && f->group == t->group && t->group > 1;
}

/* Somebody else is in front. */
bool line_is_taken(const struct tty *t)
{
	const struct tty *f = front(t->line);

	return f && f != t;
}

/* ---- seats ---- */

struct line *line_find(uint64_t device)
{
	for (struct line *l = lines; l; l = l->next)
		if (l->device == device && !l->ended)
			return l;
	return NULL;
}

struct line *line_new(uint64_t device)
{
	struct line *l = calloc(1, sizeof(*l));

	if (!l)
		return NULL;
	l->device = device;
	l->slave = -1;
	l->next = lines;
	lines = l;
	return l;
}

void line_sit(struct line *l, struct tty *t)
{
	t->line = l;
	t->next = l->seats;
	l->seats = t;
	if (t->group)
		l->owner = t;
	line_look(l);
}

static void speak(struct line *l, struct tty *t)
{
	l->speaker = t;
	l->heir = NULL;
	for (struct tty *s = l->seats; s; s = s->next) {
		s->chan->src_gate = s == t;
		if (s == t)
			s->chan->src.ready = true;
		stream_mark(s->chan->stream);
	}
}

/* ---- in order ---- */

static void ask(struct line *l)
{
	l->step = LINE_WAITS;
	l->said_alive = false;
	l->until = now_us() + SYNC_US;
	frame_put_u32(l->speaker->chan->stream, F_SYNC, l->speaker->chan->id, ++l->asked);
}

/* Everything up to `asked` is written, or its writer is given up. */
static void synced(struct line *l)
{
	bool more = false;

	l->step = LINE_RESTS;
	l->told = l->told_since;
	l->told_since = false;
	for (struct tty *t = l->seats; t; t = t->next) {
		if (!t->waits_for)
			continue;
		if ((int32_t)(l->asked - t->waits_for) >= 0) {
			t->waits_for = 0;
			t->chan->draining = false;
			stream_mark(t->chan->stream);
		} else {
			more = true;
		}
	}
	if (l->heir && l->told && can_speak(l->speaker))
		ask(l);
	else if (l->heir)
		speak(l, l->heir);
	line_look(l);
	if (more && l->step == LINE_RESTS && l->speaker) {
		l->step = LINE_READS;
		l->until = now_us() + READ_US;
		l->speaker->chan->draining = true;
		stream_mark(l->speaker->chan->stream);
	}
}

/* Chooses the speaker. */
void line_look(struct line *l)
{
	struct tty *best = front(l);

	if (!best && l->speaker && !l->speaker->over && can_speak(l->speaker))
		best = l->speaker;
	for (int over = 0; over < 2 && !best; over++)
		for (struct tty *t = l->seats; t && !best; t = t->next)
			if (t->over == over && can_speak(t))
				best = t;
	if (!best || best == l->speaker) {
		if (l->heir)
			speak(l, l->speaker); /* after all */
		return;
	}
	if (!l->speaker || !is_open(l->speaker) || (!l->told && l->step == LINE_RESTS)) {
		speak(l, best);
		if (l->step != LINE_RESTS)
			synced(l); /* there is nobody left to wait for */
		return;
	}
	l->heir = best;
	l->speaker->chan->src_gate = false; /* no more by this way */
	if (l->step != LINE_WAITS)
		ask(l);
}

void line_synced(struct tty *t, uint32_t token)
{
	struct line *l = t->line;

	t->asleep = false;
	if (t == l->speaker && l->step == LINE_WAITS && token == l->asked)
		synced(l);
	else if (t == l->speaker)
		l->said_alive = true;
}

/* A job's output shall be out, which another's stream carries. */
void line_drain(struct tty *t)
{
	struct line *l = t->line;

	if (t->waits_for)
		return;
	if (!l->speaker || !can_speak(l->speaker)) {
		t->chan->draining = false;
		return;
	}
	t->waits_for = l->asked + (l->step == LINE_WAITS ? 2 : 1);
	if (!t->waits_for)
		t->waits_for = 1;
	if (l->step != LINE_RESTS)
		return;
	l->step = LINE_READS;
	l->until = now_us() + READ_US;
	l->speaker->chan->draining = true;
	stream_mark(l->speaker->chan->stream);
}

/* The speaker has read all there was. */
void line_drained(struct tty *t)
{
	if (t->line->step == LINE_READS && t->line->speaker == t)
		ask(t->line);
}

/* ---- the foreground ---- */

static void give(struct line *l, struct tty *to, uint32_t group)
{
	struct tty *teller = to ? to : l->seats;

	l->owner = to;
	if (!teller || !tty_is_native(l))
		return;
	l->settling = now_us() + SETTLE_US;
	l->order = ++orders;
	report(C_FRONT, teller->chan->stream->id, group, orders);
}

void line_foreground(struct tty *t, uint32_t group)
{
	struct line *l = t->line;
	uint32_t before = t->group;

	t->group = group;
	t->asleep = false;
	if (group && !before) {
		give(l, t, group);
	} else if (!group && l->owner == t) {
		struct tty *other = NULL;

		for (struct tty *s = l->seats; s && !other; s = s->next)
			other = s->group ? s : NULL;
		if (other)
			l->owner = other;
		else
			give(l, NULL, 0);
	}
	line_look(l);
}

static void settled(struct line *l)
{
	l->settling = 0;
	for (int signo = 1; l->typed; signo++) {
		if (l->typed & 1u << signo)
			tty_type(l, signo);
		l->typed &= ~(1u << signo);
	}
	for (struct tty *t = l->seats; t; t = t->next)
		stream_mark(t->chan->stream);
}

void line_fronted(int order)
{
	for (struct line *l = lines; l; l = l->next)
		if (l->settling && l->order == order)
			settled(l);
}

/* The ghost is about to stop. */
void line_sleeps(struct tty *t)
{
	t->asleep = true; /* where there is no other, what comes out meanwhile waits for it */
	t->group = 0;
	line_look(t->line);
}

void line_leave(struct tty *t)
{
	struct line *l = t->line;
	struct tty **at = &l->seats;

	while (*at != t)
		at = &(*at)->next;
	*at = t->next;
	if (l->heir == t)
		l->heir = NULL;
	if (!l->seats) {
		struct line **here = &lines;

		while (*here != l)
			here = &(*here)->next;
		*here = l->next;
		if (l->slave >= 0)
			close(l->slave);
		free(l);
		return;
	}
	if (l->owner == t)
		give(l, NULL, 0);
	if (l->speaker == t) {
		l->speaker = NULL;
		line_look(l);
		if (l->step != LINE_RESTS)
			synced(l);
	}
}

/* Returns when to look again. */
static int64_t tick(struct line *l, int64_t now)
{
	if (l->settling && now >= l->settling)
		settled(l);
	if (l->step == LINE_READS && now >= l->until && l->speaker)
		ask(l);
	if (l->step == LINE_WAITS && now >= l->until) {
		bool alive = l->said_alive;

		if (l->speaker && is_open(l->speaker) && alive) {
			l->asked--;
			ask(l);
		} else {
			if (l->speaker && l->seats->next)
				l->speaker->asleep = true;
			synced(l);
		}
	}
	if (l->step == LINE_RESTS && l->told && l->seats->next && l->speaker && now >= l->told_at + LISTEN_US)
		ask(l);
	int64_t next = l->settling ? l->settling : INT64_MAX;
	if (l->step != LINE_RESTS && l->until < next)
		next = l->until;
	else if (l->step == LINE_RESTS && l->told && l->seats->next && l->told_at + LISTEN_US < next)
		next = l->told_at + LISTEN_US;
	return next;
}

int64_t lines_tick(int64_t now)
{
	int64_t next = INT64_MAX;

	for (struct line *l = lines; l; l = l->next) {
		int64_t t = tick(l, now);

		if (t < next)
			next = t;
	}
	return next;
}
