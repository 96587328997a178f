/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Which node is meant, and what errors and versions are called: libbproc(3).
 */
#define _GNU_SOURCE
#include "lib.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

int real_node(int node)
{
	errno = 0;
	if (node != BPROC_NODE_SELF)
		return node;
	return bproc_currnode();
}

int unknown_flags(int flags)
{
	flags &= ~BPROC_DUMP_ALL;
	if (flags)
		errno = EINVAL;
	return flags;
}

EXPORT const char *bproc_strerror(int error)
{
	static const char *const texts[] = {
		"Invalid node", "Node is down", "Process is already on that node", "The node was lost on the way",
		"Invalid process",
	};

	if (error >= BE_BASE && error < BE_BASE + (int)(sizeof texts / sizeof *texts))
		return texts[error - BE_BASE];
	return strerror(error);
}

EXPORT int bproc_version(struct bproc_version_t *version)
{
	int major = 0, minor = 0, patch = 0;

	if (no_cluster() < 0)
		return -1;
	memset(version, 0, sizeof *version);
	version->magic = BPROC_MAGIC;
	version->arch = BPROC_ARCH_X86_64;
	snprintf(version->version_string, sizeof version->version_string, "%s", BPFS_VERSION);
	sscanf(BPFS_VERSION, "%d.%d.%d", &major, &minor, &patch);
	version->number = major * 10000 + minor * 100 + patch;
	return 0;
}
