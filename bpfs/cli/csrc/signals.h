/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * bpsh on several nodes: signals that come, and go on to the commands.
 */
#ifndef BPSH_SIGNALS_H
#define BPSH_SIGNALS_H

#include <signal.h>

extern int wake[2]; /* a pipe: handlers write, the loop reads */
extern volatile sig_atomic_t interrupts, interrupt_signal;

/* From now on signals end the commands, and children that end wake the loop. */
void catch_signals(void);

/* In a child: signals mean to the command what they meant to bpsh when it was called. */
void forget_signals(void);

#endif
