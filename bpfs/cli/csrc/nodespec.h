/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Nodespecs in C. The grammar, its meaning and every error message are those of bpfs/nodespec.py, where they are
 * described; tests/cli/test_bpsh_nodespec.py holds both together.
 */
#ifndef BPSH_NODESPEC_H
#define BPSH_NODESPEC_H

#include <stddef.h>

#define MASTER (-1)

/* A growing list of node numbers, in the order in which they were named. */
struct numbers {
	int *number;
	size_t count, room;
};

/* Resolves a nodespec against <mount>/status. Returns 0, or -1 with a sentence in error. */
int nodespec_expand(const char *mount, const char *spec, struct numbers *found, char *error, size_t size);

/* The shortest nodespec for these numbers, e.g. "0-3,7"; to be freed. */
char *nodespec_fold(const int *number, size_t count);

/* The whole content of a file, ended by NUL and to be freed; NULL with errno. */
char *read_whole(const char *path);

/* malloc and realloc that end the program when there is no memory. */
void *must_alloc(void *old, size_t size);

#endif
