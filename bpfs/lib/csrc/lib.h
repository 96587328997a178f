/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the parts of libbproc share.
 */
#ifndef BPFS_LIB_H
#define BPFS_LIB_H

#include "sys/bproc.h"

#include <stddef.h>
#include <stdio.h>

#define EXPORT __attribute__((visibility("default")))
#define PATH_ROOM 4352 /* of a path below the mount */

/* Where the cluster is mounted: $BPFS, or /bpfs. */
const char *bpfs_mount(void);

/* <mount>/<format...>. Returns 0, or -1 with ENAMETOOLONG. */
int bpfs_path(char *path, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The first bytes of a file, ended by NUL and without its line end. Returns their number, or -1 with errno. */
int bpfs_read(const char *path, char *text, size_t room);

/* One write of one line. Returns 0, or -1 with errno. */
int bpfs_write(const char *path, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The number behind BPROC_NODE_SELF; others as they are. -1 with errno set where it cannot be known, else errno is 0. */
int real_node(int node);

/* Whether a cluster is mounted; sets errno to ENOSYS where none is. */
int no_cluster(void);

/* errno after a file below nodes/N has failed, in the terms of BProc. Returns -1. */
int node_error(void);

/* Makes the descriptors of `io` in this process; `from` is the node that it came from. Returns 0, or -1 with errno. */
int make_io(struct bproc_io_t *io, int iolen, int from);

/* Whether io entries make sense. Returns 0, or -1 with EINVAL. */
int check_io(const struct bproc_io_t *io, int iolen);

/* Whether flags are others than BPROC_DUMP_*; sets errno to EINVAL then. */
int unknown_flags(int flags);

/* The lines of <mount>/status, one after the other. Returns -1 with errno; stops where `take` returns other than 0, and
 * returns that. */
int each_node(int (*take)(const struct bproc_node_info_t *info, void *of), void *of);

#endif
