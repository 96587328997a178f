/* mux.h - what the ghost (master) and iorelay (node) share: packets, frames and the pumping of channels.
 *
 * A job's terminals, pipes and sockets stay on the master in the hands of its ghost. Each such open file is a
 * channel; all channels of a job share one TCP stream between its ghost and the iorelay of the node it runs on.
 * Every channel has its own credit in each direction, so that one full pipe never holds up another.
 *
 *   source: local file -> stream   (ghost: what the job shall read; iorelay: what the job wrote)
 *   sink:   stream -> local file   (ghost: what the job wrote; iorelay: what the job shall read)
 *
 * The Python mirrors are bpfs/procs/ghost.py and bpfs/slave/relay.py; a test compares sizes and numbers.
 * Both ends of a stream are little-endian x86-64, so structures go out as they are.
 */
#ifndef BPFS_MUX_H
#define BPFS_MUX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* ---- control packets: bpmaster <-> ghost and bpslave <-> iorelay, one a SEQPACKET message ---- */
struct ctl {
	uint32_t type;
	int32_t a, b, c, d;
	uint32_t zero;
	uint64_t value;
	char text[4064]; /* as much as the packet holds */
};
#define CTL_HEAD offsetof(struct ctl, text)

enum ctl_type {
	/* master -> ghost */
	C_NAME = 1,   /* text: comm */
	C_STREAM = 2, /* a: its number; + descriptor of a connected TCP socket; text: channel table */
	C_HOLD = 3,   /* a: 1 when the process comes home */
	C_RESUME = 4, /* undo C_HOLD on the same stream */
	C_EXIT = 5,   /* a: exit code */
	C_KILLED = 6, /* a: signal, b: 1 when a core was dumped */
	C_STOP = 7,   /* a: signal, b: how many C_SIGNALs of SIGCONT have been heard: where more were told, it is over */
	C_CONT = 8,   /* the real process was continued on its node; SIGCONT follows */
	C_PUMP = 9,   /* give what is held to pump processes, put fresh pipes in place */
	C_FORK = 10,  /* a: pid, b: process group, c: session, text: struct birth, command line; + its control socket */
	C_REAP = 11,  /* a: pid of a child's ghost, which the real parent has waited for */
	C_IDS = 12,   /* a: session, b: process group, c: uid, d: gid */
	C_ARGUMENTS = 13, /* text: command line */
	C_SEND = 15,  /* a: pid, b: signal, c: si_code, value: si_value: send it in the name of the real process */
	C_STRIKE = 18, /* a: signal, b: si_code, value: si_value; text: pids (int32_t): likewise, to each; answered by C_STRUCK */
	C_KEEP = 14,  /* text: pids (int32_t) of children: tell of them, and leave them to be waited for; a: beside those of before */
	C_ADOPT = 17, /* from a new master, on the socket that it took out of the ghost (BPFS_HEIR): you are mine */
	C_SEEN = 16,  /* a: so many of your C_SIGNAL and C_CHILD have been dealt with; the next master is told the others */
	/* ghost -> master */
	C_READY = 32,
	C_SIGNAL = 33,      /* a: signo, b: si_code, c: si_pid, d: si_uid, value: si_value */
	C_HELD = 34,        /* a: channels that need C_PUMP before a return home, value: input bytes kept */
	C_STOPPED = 35,     /* a: signal; sent right before the ghost stops */
	C_CONTINUED = 36,
	C_STREAM_LOST = 37, /* a: errno, 0 at a plain end of file; b: how many C_STREAM had come */
	C_PUMPED = 38,      /* a: errno or 0 */
	C_CHILD = 40,       /* a: pid of a kept child, b: CLD_... , c: exit code or signal */
	C_INTERRUPTED = 41, /* something that is no signal has stopped the ghost for a moment: a debugger? */
	C_BORN = 39,        /* a: pid, b: errno or 0, c: this ghost has a SIGCONT of the user's yet to tell of */
	C_CHILD_STOPPED = 44, /* a: pid of a child's ghost, which may be SIGSTOP's doing; of many at once, one may be told of */
	C_STRUCK = 43,      /* a: how many got it; b: why others did not, ESRCH where nothing else was in the way */
	C_ADOPTED = 42,     /* a: number of the stream it has, 0: none that is open; b: it holds it */
	/* slave -> iorelay */
	C_ATTACH = 64, /* a: stream id, + descriptors: TCP socket, then those of each channel; text: channel table; b: the
	                * terminal is its session's, c: the job's group, where that is in the foreground at home.
	                * Of a stream that is there already: only a new TCP socket for it */
	C_DETACH = 65, /* a: stream id: close everything of it; answered by C_ENDED, whether or not it exists */
	C_FRONTED = 66, /* a: c of a C_FRONT that has been carried out */
	C_LIST = 67,    /* to a slave that was started anew: all streams, each in a C_HAS, and then C_LISTED */
	/* iorelay -> slave */
	C_ENDED = 96, /* a: stream id: the ghost said goodbye, all is closed */
	C_LOST = 97,  /* a: stream id: the stream broke; the job's ends stay open until C_DETACH */
	C_FRONT = 98, /* a: stream id, b: the group to be in the foreground of its terminal, 0: the session leader's; c: number
	               * of this order; answered by C_FRONTED */
	C_HAS = 99,   /* a: stream id, b: it is broken */
	C_LISTED = 100,
};

/* What a child's ghost is born with. */
struct birth {
	uint32_t uid, gid;
	uint8_t orphan;   /* its parent is init */
	uint8_t terminal; /* the real one has the session's terminal on its node: what is typed reaches it there */
	uint16_t zero;
	char comm[16];
};

/* One record of a channel table; nfds descriptor numbers (int32_t) follow it. */
struct chan_record {
	uint8_t chan, kind, access, nfds;
};
enum chan_kind { K_TTY = 1, K_PIPE = 2, K_SOCKET = 3, K_FILE = 4 };
#define MAX_CHANS 64
#define MAX_FDS 64 /* dups of one open file */

/* ---- frames on the TCP stream ---- */
struct frame {
	uint8_t type, chan;
	uint16_t zero;
	uint32_t len; /* bytes that follow */
};
enum frame_type {
	F_DATA = 1,
	F_EOF = 2,        /* no more data from the source; payload u32: 1 = only shut down, not closed */
	F_WINDOW = 3,     /* payload u32: so many more bytes may come */
	F_CLOSED = 4,     /* the sink's reader is gone: close the source; payload u64: bytes it consumed */
	F_PENDING = 5,    /* ghost: the real terminal has input, say when the job waits for some */
	F_WANT = 6,       /* relay: the job waits for terminal input; payload u32: most bytes it would take */
	F_TERMIOS = 7,    /* payload: kernel struct termios; from the ghost also u32: how many of the relay's it has seen */
	F_WINSIZE = 8,    /* payload: struct winsize */
	F_TTYSIG = 9,     /* ghost: payload u32: this signal was typed at the terminal */
	F_NOSIG = 10,     /* relay: no foreground group there; deliver it to the job yourself */
	F_HOLD = 11,      /* ghost: send all output, give unread input back */
	F_BACK = 12,      /* relay: unread input; an empty one is a terminal's end-of-file */
	F_HELD = 13,      /* relay: nothing is left here */
	F_RESUME = 14,    /* ghost: go on after F_HELD */
	F_DRAIN = 15,     /* ghost: payload u32 token, u32 enum drain, u32 its process group: send all output */
	F_DRAINED = 16,   /* relay: payload u32 token: done */
	F_FOREGROUND = 17,/* ghost: payload u32: its group, in the terminal's foreground; 0 = not there; 1 = no job control */
	F_FLUSH = 18,     /* relay: the job discarded its terminal's unread input */
	F_BYE = 19,       /* ghost: an orderly end of this stream */
	F_SYNC = 20,      /* relay: payload u32 token: say when all of the terminal's output so far is written */
	F_SYNCED = 21,    /* ghost: payload u32 token: it is; 0: not yet */
	F_NATIVE = 22,    /* relay: the kernel there knows what is in the background, and does SIGTTIN and SIGTTOU by itself */
};

/* What the ghost is about to do. */
enum drain { DRAIN_CONT = 0, DRAIN_END = 1, DRAIN_STOP = 2 };

#define OUTPUT_WINDOW (256u << 10) /* job -> master, per channel */
#define INPUT_WINDOW (64u << 10)   /* master -> job at first: what is read ahead is lost when a job ends early */
#define INPUT_WINDOW_MAX (256u << 10)
#define HOLD_MAX (4u << 20)   /* most a channel may send between F_HOLD and F_HELD: a 1 MB pipe and some */
#define FRAME_MAX (256u << 10) /* longest DATA or BACK */
#define SMALL_MAX 256u         /* longest of all other frames */
#define TTY_MAX 4096u          /* a terminal's input buffer */

/* ---- a growing first-in-first-out buffer ---- */
struct buf {
	uint8_t *data;
	size_t off, len, cap;
};
uint8_t *buf_room(struct buf *b, size_t n); /* n writable bytes at the end; never fails (exits) */
void buf_add(struct buf *b, const void *data, size_t n);
void buf_front(struct buf *b, const void *data, size_t n);
void buf_drop(struct buf *b, size_t n);
void buf_free(struct buf *b);
static inline uint8_t *buf_head(struct buf *b) { return b->data + b->off; }

/* ---- descriptors in the epoll loop ---- */
struct port {
	int fd;          /* -1: none */
	uint32_t armed;  /* events asked of the kernel */
	bool listed;     /* known to epoll */
	bool always;     /* a regular file: always ready, epoll refuses it */
	bool ready;      /* a source may have data (cleared by EAGAIN) */
	void (*call)(struct port *, uint32_t events);
	void *owner;
};
void port_open(struct port *p, int fd, void (*call)(struct port *, uint32_t), void *owner);
void port_want(struct port *p, uint32_t events);
void port_forget(struct port *p);
void port_close(struct port *p);
void loop_init(void);
void loop_forget(void); /* no stream waits for service */
#define MS 1000 /* microseconds */
bool loop_once(int64_t timeout_us); /* -1: none. Returns whether it was interrupted */
int64_t now_us(void);
int64_t now_ms(void);

/* ---- channels and streams ---- */
struct stream;
struct tty; /* each side's own terminal state */
struct chan {
	uint8_t id, kind, access, nfds;
	int32_t fds[MAX_FDS]; /* ghost: the job's descriptors; iorelay: unused */
	struct stream *stream;
	struct tty *tty;
	struct port src, sink;
	/* source */
	struct buf back;      /* to be sent before anything is read; terminals: records */
	struct buf returned;  /* ghost: came back with F_BACK, goes before `back` at F_HELD */
	bool src_end;         /* end of file was read */
	bool src_shutdown;    /* ... but the job only shut down, the file is open */
	bool eof_sent;        /* ... and told on this stream */
	bool src_gate;        /* terminals on the ghost: reading is allowed now */
	bool draining;        /* must be read until it is empty */
	uint32_t credit;      /* bytes the other side takes */
	/* sink */
	struct buf out;       /* received, not yet written; iorelay's terminals: records */
	bool out_end;         /* F_EOF came: close after out is empty */
	bool out_shutdown;
	bool sink_gone;       /* nobody reads: F_CLOSED was sent */
	bool may_splice;      /* ghost: a pipe that was opened nonblocking */
	bool sink_pipe;       /* splice(2) works */
	bool records;         /* iorelay's terminals: `out` holds records of u16 length + bytes, 0 = end of file */
	bool sink_gate;       /* a background writer under TOSTOP waits */
	uint32_t window;      /* most that may be in flight */
	uint32_t granted;     /* bytes that may still come */
	uint32_t eaten;       /* written, not yet granted anew */
	uint64_t moved;       /* bytes that passed here since the stream began: files are rewound by it */
	int pipe_path;        /* iorelay: O_PATH of the input pipe, to take unread bytes back */
	int peer;             /* iorelay: dup of the job's end of a socket pair, own read end of a pipe with all written, -1 */
};

struct stream {
	struct port tcp;
	int32_t id;
	bool open, held, holding, dirty, dead, over;
	struct chan *chans;
	int nchans, turn;
	/* receiving */
	uint8_t head[sizeof(struct frame)];
	size_t head_len;
	uint32_t left; /* payload bytes still to come */
	uint8_t small[SMALL_MAX];
	uint32_t small_len;
	/* sending: lead + bytes in the way pipe go before tx */
	struct buf tx;
	uint8_t lead[sizeof(struct frame)];
	size_t lead_left, splice_left;
	int way[2]; /* a private pipe: what is in it is ours, whoever else reads the source */
	bool progress;
	uint32_t settings; /* F_TERMIOS frames from relay to ghost so far */
	/* iorelay */
	bool drain_asked, drain_over, drain_stops;
	uint32_t drain_token;
	struct stream *next, *next_dirty;
};

void stream_init(struct stream *s, int fd);
void stream_lose(struct stream *s, int err); /* closes the socket, tells the side */
void stream_service(struct stream *s);
void stream_event(struct port *p, uint32_t events);
void stream_mark(struct stream *s);
void frame_put(struct stream *s, uint8_t type, uint8_t chan, const void *data, uint32_t len);
void frame_put_u32(struct stream *s, uint8_t type, uint8_t chan, uint32_t value);
struct chan *chan_find(struct stream *s, uint8_t id);
void chan_init(struct chan *c, struct stream *s);
void chan_flush(struct chan *c);
void chan_src_event(struct port *p, uint32_t events);
void chan_sink_event(struct port *p, uint32_t events);
void chan_sink_gone(struct chan *c);
void chan_grant(struct chan *c, uint32_t credit);
void chan_eat(struct chan *c, size_t n);
uint32_t chan_allowance(const struct chan *c);
bool chan_bidirectional(const struct chan *c);

/* ---- what each side supplies ---- */
ssize_t side_read(struct chan *c, void *data, size_t n);        /* -1 EAGAIN, 0 end of file */
ssize_t side_write(struct chan *c, const void *data, size_t n); /* -1 EAGAIN */
bool side_may_splice_source(struct chan *c);
bool side_pump_special(struct chan *c); /* terminals: true when the side does sources by itself */
void side_flush_special(struct chan *c);/* iorelay's terminals: write records */
bool side_watches_sink(const struct chan *c); /* whether a reader that goes away matters now */
void side_sink_end(struct chan *c);     /* all written after F_EOF: close or shut down */
void side_source_closed(struct chan *c, uint64_t consumed); /* F_CLOSED came: drop the source */
bool side_frame(struct stream *s, const struct frame *h, const uint8_t *data); /* all frames mux.c does not know */
void side_serviced(struct stream *s);   /* after each round */
void side_lost(struct stream *s, int err);

#endif
