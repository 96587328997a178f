/* ghost.h - the parts of the ghost: ghost.c (control, signals), ghost_life.c (stop, continue, end), ghost_io.c
 * (descriptors), ghost_tty.c (the real terminal), ghost_pump.c (processes that pump on without the ghost),
 * ghost_child.c (ghosts of the job's children), ghost_heir.c (the next master).
 */
#ifndef BPFS_GHOST_H
#define BPFS_GHOST_H

#include "mux.h"

#include <sys/ioctl.h>
#include <sys/signalfd.h>

/* struct termios as the kernel's TCGETS has it; the C library's is longer. */
struct kernel_termios {
	uint32_t iflag, oflag, cflag, lflag;
	uint8_t line, cc[19];
};
#define TCGETS 0x5401
#define TCSETS 0x5402
#define K_OPOST 1u
#define K_ONLCR 4u
#define K_ODD (8u | 16u | 32u) /* OCRNL, ONOCR, ONLRET: rare, and not to be undone byte by byte */
#define K_ICANON 2u
#define K_ECHO 8u
#define K_TOSTOP 0400u
#define K_EXTPROC 0200000u

struct tty {
	bool controlling;  /* job control applies to it */
	bool foreground;
	bool pending;      /* F_PENDING was sent, F_WANT not yet seen */
	uint32_t want;     /* bytes the job would read now */
	bool changed;      /* `termios` is to be applied, once in the foreground */
	bool missed;       /* `termios` came while the terminal was another job's */
	size_t before;     /* bytes of `out` that come before that */
	struct kernel_termios termios;
	int64_t next_ttin, next_ttou; /* at most one such signal a second */
	bool native;       /* F_NATIVE: the node's kernel sends them */
	uint32_t sync;     /* F_SYNC to be answered when `sync_after` bytes of `out` are written; 0: none */
	size_t sync_after;
	struct kernel_termios pushed; /* as the node was told last */
	struct winsize size;
};

extern struct stream the_stream;
extern struct chan the_chans[MAX_CHANS];

/* One thing at a time waits until all output the job made so far has been written. */
struct barrier {
	enum barrier_what { B_NONE, B_STOP, B_CONT, B_END } what;
	bool killed, core;
	int number; /* signal, exit code */
	uint32_t token;
	bool drained;
	int64_t deadline;
	struct signalfd_siginfo info;
};
extern struct barrier barrier;

/* ghost.c */
extern struct port control, signals;
extern bool pumping; /* this is a child that only pumps; the ghost has ended */
void tell(uint32_t type, int a, int b, int c, int d, uint64_t value);
void forward(const struct signalfd_siginfo *i);
void drop_rights(void);
_Noreturn void start_over(int control_fd, bool has_terminal); /* in a clone */
void signal_self(int signo);

/* ghost_life.c */
void barrier_start(enum barrier_what what, int number);
void barrier_check(void);
int64_t barrier_until(void); /* when it is over at the latest */
void pump_check(void);
bool cont_pending(void);

/* ghost_io.c */
int stream_table(const uint8_t *text, size_t len); /* errno or 0 */
void stream_grant_all(void);
uint64_t take_held(bool home, int *pumps);
int count_pumps(void);
bool all_written(void);
bool any_alive(void);
int high_fd(int fd);
void close_copies(struct chan *c);

/* ghost_heir.c */
void heir_make(void);
int heir_follow(int number); /* the control socket to the next master, or -1 */
void heir_taken(void);
void heir_close(void);
void heir_forget(void);

/* ghost_tty.c */
void tty_init(struct chan *c);
bool tty_pump(struct chan *c);
void tty_want(struct chan *c, uint32_t most);
void tty_set(struct chan *c, const struct kernel_termios *t);
void tty_settle(struct chan *c);
bool tty_write_barred(struct chan *c);
ssize_t tty_write(struct chan *c, const uint8_t *data, size_t n);
void tty_give_back(struct chan *c);
void tty_discard(struct chan *c);
void ttys_refresh(bool force);
void ttys_left(pid_t group, bool stopped);
void ttys_greet(void);
bool ttys_in_background(void);
bool ttys_barred(void);
bool ttys_stop_is_stale(int signo);
bool ttys_signal(int signo);
void ttys_winsize(void);
void tty_sync(struct chan *c, uint32_t token);

/* ghost_pump.c */
int pump_all(void); /* errno or 0 */
void core_prepare(void);

/* ghost_child.c */
void bear(const struct ctl *m, size_t text, int fd);
void reap(pid_t pid);
void reap_owed(void);
void keep(const struct ctl *m, size_t text);
void look_at_kept(void);
void show_arguments(const char *text, size_t length);
void take_ids(int sid, int pgid, uint32_t uid, uint32_t gid);

#endif
