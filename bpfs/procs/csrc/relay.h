/* relay.h - the parts of iorelay: iorelay.c (streams, pipes, sockets), relay_hold.c (moves, ends), relay_tty.c
 * (terminals), relay_line.c (terminals that jobs share), relay_want.c (who waits).
 */
#ifndef BPFS_RELAY_H
#define BPFS_RELAY_H

#include "mux.h"

/* struct termios as the kernel's TCGETS has it; the C library's is longer. */
struct kernel_termios {
	uint32_t iflag, oflag, cflag, lflag;
	uint8_t line, cc[19];
};

/* A job's seat at a terminal. */
struct tty {
	struct line *line;
	struct chan *chan;
	struct tty *next;
	int job;            /* duplicate of the job's: tells when it set O_NONBLOCK; -1 */
	uint32_t group;     /* its ghost is in the foreground, as this group; 1: without job control; 0: it is not */
	uint32_t waits_for; /* until the speaker has written all up to this F_SYNC; 0: not */
	bool asleep;        /* its ghost has stopped: it writes nothing */
	bool over;          /* the job has ended */
	bool told_native;
	bool pending;
	uint32_t last_group; /* of an ended job: its children may be there still */
	int hint, delay;
	int64_t next_look;
};

/* A pseudo-terminal; see relay_line.c. */
struct line {
	struct line *next;
	struct tty *seats;
	struct tty *speaker; /* its src is the only one that is read */
	struct tty *heir;    /* speaks next */
	struct tty *owner;   /* the line's foreground was given to it last */
	enum { LINE_RESTS, LINE_READS, LINE_WAITS } step; /* the speaker reads all there is; is asked whether it is written */
	uint32_t asked;      /* F_SYNCs so far */
	bool said_alive, told; /* told: the speaker was given something since it was last asked, */
	bool told_since;     /* ... and since it has been asked */
	int64_t until, told_at;
	bool session;        /* made as a session's controlling terminal */
	bool ended;          /* no job has it open any more */
	int64_t settling;    /* its foreground group is being set; given up then */
	int order;
	uint32_t typed;      /* signals that were typed meanwhile */
	int slave;           /* our own open of it, nonblocking; -1 when all jobs are over */
	uint64_t device;
	struct kernel_termios termios; /* as last told to a ghost or by it */
};

/* iorelay.c */
void report(uint32_t type, int id, int b, int c);
int reopen(int path_fd, int flags);
bool is_pipe(const struct chan *c);
bool hangs(int fd);
void destroy(struct stream *s);

/* relay_hold.c */
void relay_resume(struct stream *s);

/* relay_tty.c */
bool tty_open(struct chan *c, const int *fds, int n, bool session, uint32_t front);
bool tty_pump(struct chan *c);
void tty_flush(struct chan *c);
void tty_take_back(struct chan *c);
void tty_over(struct chan *c, uint32_t group);
void tty_hang_up(struct chan *c);
void tty_free(struct chan *c);
bool tty_frame(struct chan *c, const struct frame *h, const uint8_t *data);
int64_t tty_tick(struct chan *c, int64_t now);
void tty_type(struct line *l, int signo);
bool tty_is_native(const struct line *l);
void tty_drained(struct chan *c, bool over, bool stops);

/* relay_line.c */
struct line *line_find(uint64_t device);
struct line *line_new(uint64_t device);
void line_sit(struct line *l, struct tty *t);
void line_leave(struct tty *t);
void line_look(struct line *l);
void line_synced(struct tty *t, uint32_t token);
void line_drain(struct tty *t);
void line_drained(struct tty *t);
void line_foreground(struct tty *t, uint32_t group);
void line_fronted(int order);
void line_sleeps(struct tty *t);
bool line_in_front(const struct tty *t);
bool line_is_second(const struct tty *t);
bool line_is_taken(const struct tty *t);
int64_t lines_tick(int64_t now);

/* relay_want.c: how many bytes somebody waits to read from the terminal `device` now; 0: nobody does.
 * group: the terminal's foreground group, 0: any process. hint: the last one found, looked at first. */
uint32_t reader_waits(uint64_t device, int group, int *hint, bool lines);

/* Whether a process with the controlling terminal `device` is in this process group of its own namespace. */
bool group_lives(uint64_t device, uint32_t group);

#endif
