/* What nodeinit and the Python side (engine/jobspace.py) share: report packets and commands.
 * SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef NODEINIT_H
#define NODEINIT_H

#include <stdint.h>

enum report_kind {
	REPORT_BORN = 0,    /* from the starter: pid = pid 1 as the caller sees it, or status = errno */
	REPORT_CHILD = 1,   /* a child changed state: code and status as waitid gives them */
	REPORT_SIGNAL = 2,  /* somebody sent `pid` the signal `status` (utime_us = its value) */
	REPORT_READY = 3,   /* mounts and pid block are in place; code = 1 when the pid block is */
	REPORT_FAILED = 4,  /* command `code` for `pid` failed with errno `status` */
};

/* All pids are the job namespace's own. */
struct report {
	uint32_t kind;
	int32_t pid;
	int32_t reporter;
	int32_t code;
	int32_t status;
	uint32_t uid;
	uint64_t utime_us;
	uint64_t stime_us;
	int64_t maxrss_kb;
	int32_t sender;
	int32_t zero;
};

/* A command is the signal SIGRTMAX sent with a value from an ancestor pid namespace:
 * the upper half is the cookie of BPFS_COOKIE, the lower a number (24 bits, a pid if nothing else is said) and these. */
enum command {
	COMMAND_SETSID = 1 << 24,   /* the new process leads a session */
	COMMAND_SETPGID = 2 << 24,  /* the new process leads a process group */
	COMMAND_SIBLING = 4 << 24,  /* its parent is the parent of the process that makes it */
	COMMAND_KILL_ALL = 8 << 24, /* pid 1: kill everything else in the namespace */
	COMMAND_END = 32 << 24,      /* end with the wait status NUMBER: the real process has, elsewhere */
	COMMAND_STOP = 64 << 24,     /* stop by the signal NUMBER; SIGCONT from outside is for this one alone */
	COMMAND_SEND = 128u << 24,   /* send NUMBER the signal in si_errno, with SENT_QUEUED as sigqueue(3) does; 0: the value is
	                              * in si_errno (upper half) and si_uid */
	COMMAND_TERMINAL = 16 << 24, /* let go of the controlling terminal and take /dev/pts/NUMBER */
	COMMAND_FOREGROUND = COMMAND_TERMINAL | COMMAND_SETPGID, /* its foreground is process group NUMBER */
	COMMAND_LEASE = COMMAND_TERMINAL | COMMAND_SIBLING, /* pid 1: end, with all, when CLOCK_BOOTTIME is si_errno (upper half)
	                                                     * and si_uid, in milliseconds; 0: never */
	COMMAND_BEAR = COMMAND_TERMINAL | COMMAND_SETSID, /* a packet waits: struct birth_head, struct birth_table */
};
#define COMMAND_PID_MASK 0xffffff  /* pid 0: no new process, the receiver itself */

#define SENT_QUEUED 0x100

/* Pid 1 holds both ends of a SEQPACKET socket at this number and the next; packets are sent into the second one. */
#define ORDERS_FD 60

#define BIRTH_MAGIC 0x31424642
#define BIRTH_LINKS 3
#define BIRTH_ASIDE 1

/* What the node knows of a job that is to be born, see bear.h. */
struct birth_head {
	uint32_t magic;
	int32_t pid;
	uint32_t how;   /* COMMAND_SIBLING, COMMAND_SETSID */
	int32_t pgid;   /* the group to join; 0: that of its maker */
	uint32_t uid;   /* its user, who may signal the placeholders */
	uint32_t links; /* placeholders to be made before */
	struct {
		int32_t pid;
		uint32_t how; /* COMMAND_SIBLING, COMMAND_SETSID, COMMAND_SETPGID, BIRTH_ASIDE: its maker makes what comes next */
	} link[BIRTH_LINKS];
};

/* What the master does, alike for all: `files` times struct birth_file and `rows` times struct birth_row follow, and
 * what they point to, by offsets from here. */
struct birth_table {
	uint32_t files, rows;
	uint32_t high; /* a number above all descriptors of the job */
	uint32_t zero;
};

struct birth_file {
	uint64_t path, inode, size, mtime_ns;
	uint32_t major, minor;
};

enum argument { ARGUMENT_VALUE, ARGUMENT_ADDRESS, ARGUMENT_STRINGS, ARGUMENT_PASSED, ARGUMENT_OPENED };

/* A system call. STRINGS: offsets of strings up to ~0; PASSED: that of the descriptors which came along, without the
 * first one; OPENED: what the last open(2) returned. */
struct birth_row {
	uint32_t number;
	uint8_t must; /* its failure is that of the birth */
	uint8_t kind[6];
	uint8_t zero[5];
	uint64_t argument[6];
};

#define SCRATCH_ADDRESS 0x10000UL  /* where the engine injects its call runner */
#define SCRATCH_BYTES (256UL << 10)

#endif
