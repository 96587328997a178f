/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * bpsh -T: a terminal of its own for each command.
 */
#ifndef BPSH_TERMINAL_H
#define BPSH_TERMINAL_H

#include <stddef.h>

/* Looks at our own terminal. For one command alone it becomes raw, so that every key goes to the node. */
void terminal_take(size_t commands);

/* Gives our own terminal back as it was; may be called by a signal handler, and more than once. */
void terminal_restore(void);

/* Opens a terminal: ends[0] is ours, ends[1] the command's. Returns -1 with errno. */
int terminal_open(int ends[2]);

/* Makes `fd` the controlling terminal of this process, in a session of its own. Returns -1 with errno. */
int terminal_enter(int fd);

/* Gives a terminal the size that ours has now. */
void terminal_resize(int fd);

#endif
