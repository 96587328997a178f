/* SPDX-License-Identifier: GPL-2.0-or-later
 * See terminal.h. */
#define _GNU_SOURCE
#include "terminal.h"

#include <fcntl.h>
#include <pty.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

static struct termios ours;
static volatile int raw; /* ours is raw now, and `ours` is what it was */

/* The first of our standard descriptors that is a terminal; -1: none. */
static int own_terminal(void)
{
	for (int fd = 0; fd < 3; fd++)
		if (isatty(fd))
			return fd;
	return -1;
}

void terminal_take(size_t commands)
{
	struct termios changed;
	if (commands != 1 || tcgetattr(0, &ours) < 0)
		return;
	changed = ours;
	cfmakeraw(&changed);
	raw = 1;
	atexit(terminal_restore);
	tcsetattr(0, TCSADRAIN, &changed);
}

void terminal_restore(void)
{
	if (raw)
		tcsetattr(0, TCSADRAIN, &ours);
	raw = 0;
}

int terminal_open(int ends[2])
{
	struct termios modes;
	if (openpty(&ends[0], &ends[1], NULL, NULL, NULL) < 0)
		return -1;
	fcntl(ends[0], F_SETFD, FD_CLOEXEC);
	fcntl(ends[1], F_SETFD, FD_CLOEXEC);
	if (raw)
		modes = ours;
	else if (tcgetattr(ends[1], &modes) == 0)
		/* What is typed has been seen on our own terminal, and what comes from a file is no output. */
		modes.c_lflag &= ~(tcflag_t)ECHO;
	tcsetattr(ends[1], TCSANOW, &modes);
	terminal_resize(ends[0]);
	return 0;
}

int terminal_enter(int fd)
{
	return setsid() < 0 ? -1 : ioctl(fd, TIOCSCTTY, 0);
}

void terminal_resize(int fd)
{
	struct winsize size;
	int own = own_terminal();
	if (own >= 0 && ioctl(own, TIOCGWINSZ, &size) == 0)
		ioctl(fd, TIOCSWINSZ, &size);
}
