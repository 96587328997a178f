/* relay.h - the parts of iorelay: iorelay.c (streams, pipes, sockets), relay_hold.c (moves, ends), relay_tty.c
 * (terminals), relay_want.c (who waits).
 */
#ifndef BPFS_RELAY_H
#define BPFS_RELAY_H

#include "mux.h"

/* struct termios as the kernel's TCGETS has it; the C library's is longer. */
struct kernel_termios {
	uint32_t iflag, oflag, cflag, lflag;
	uint8_t line, cc[19];
};

/* iorelay.c */
void report(uint32_t type, int id);
int reopen(int path_fd, int flags);
bool is_pipe(const struct chan *c);
bool hangs(int fd);
void destroy(struct stream *s);

/* relay_hold.c */
void relay_resume(struct stream *s);

/* relay_tty.c */
bool tty_open(struct chan *c, const int *fds, int n);
bool tty_pump(struct chan *c);
void tty_flush(struct chan *c);
void tty_take_back(struct chan *c);
void tty_over(struct chan *c);
void tty_hang_up(struct chan *c);
void tty_free(struct chan *c);
bool tty_frame(struct chan *c, const struct frame *h, const uint8_t *data);
int64_t tty_tick(struct chan *c, int64_t now);

/* relay_want.c: how many bytes somebody waits to read from the terminal `device` now; 0: nobody does.
 * group: the terminal's foreground group, 0: any process. hint: the last one found, looked at first. */
uint32_t reader_waits(uint64_t device, int group, int *hint, bool lines);

#endif
