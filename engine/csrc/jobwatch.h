/* What jobwatch and the Python side (engine/jobwatch.py) share.
 * SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef JOBWATCH_H
#define JOBWATCH_H

#include <stdint.h>

/* A client's first packet carries two descriptors: the job namespace's /proc, and the namespace itself. Each packet,
 * the first included, is one of these: look at the whole namespace, or at one process, now. */
struct look {
	int32_t pid; /* 0: everything; and go on listening */
};

enum record_kind {
	RECORD_IS = 1,     /* a process as it is now */
	RECORD_ENDED = 2,  /* `code` is its wait status, -1 where nobody knows */
	RECORD_REAPED = 3, /* its parent has waited for it: it is gone */
	RECORD_STOOD = 4,  /* a placeholder has ended (`code`), or (state T) was stopped, and not by order */
};

/* Records follow each other in a packet; `size` bytes each, padded to 4, the command line at the end. Pids are the
 * job namespace's own. */
struct record {
	uint16_t size;
	uint8_t kind;
	uint8_t state; /* letter of /proc/PID/stat */
	int32_t pid, ppid, pgid, sid, tty;
	int32_t code;
	uint32_t uid, gid;
	uint32_t arguments; /* bytes of the command line that follow */
	char comm[16];
};

#define ARGUMENTS_MAX 3072
#define PACKET_MAX 32768

#endif
