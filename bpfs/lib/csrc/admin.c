/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Rights to nodes, and their states: libbproc(3).
 */
#define _GNU_SOURCE
#include "lib.h"

#include <errno.h>
#include <grp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int set(int node, const char *file, const char *format, unsigned int value)
{
	char path[PATH_ROOM];

	if (bpfs_path(path, "nodes/%d/%s", real_node(node), file) < 0)
		return -1;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
	return bpfs_write(path, format, value) < 0 ? node_error() : 0;
#pragma GCC diagnostic pop
}

EXPORT int bproc_chmod(int node, int mode)
{
	return set(node, "mode", "%o\n", (unsigned int)mode);
}

EXPORT int bproc_chown(int node, int user)
{
	return set(node, "owner", "%u\n", (unsigned int)user);
}

EXPORT int bproc_chgrp(int node, int group)
{
	return set(node, "group", "%u\n", (unsigned int)group);
}

static int in_group(gid_t group)
{
	int count = getgroups(0, NULL), found = getegid() == group;
	gid_t *groups = count > 0 ? calloc((size_t)count, sizeof *groups) : NULL;

	if (groups) {
		count = getgroups(count, groups);
		for (int i = 0; i < count; i++)
			found |= groups[i] == group;
		free(groups);
	}
	return found;
}

EXPORT int bproc_access(int node, int mode)
{
	struct bproc_node_info_t info;
	unsigned int bit;

	if (mode & ~BPROC_X_OK) {
		errno = EINVAL;
		return -1;
	}
	if (real_node(node) == BPROC_NODE_MASTER)
		return no_cluster() < 0 ? -1 : 0;
	if (bproc_nodeinfo(node, &info) < 0)
		return -1;
	if (!(mode & BPROC_X_OK) || geteuid() == 0)
		return 0;
	bit = geteuid() == info.user ? 0100 : in_group(info.group) ? 0010 : 0001;
	if (info.mode & bit)
		return 0;
	errno = EACCES;
	return -1;
}

EXPORT int bproc_nodesetstatus(int node, char *status)
{
	char path[PATH_ROOM];

	if (bpfs_path(path, "nodes/%d/state", real_node(node)) < 0)
		return -1;
	return bpfs_write(path, "%s\n", status) < 0 ? node_error() : 0;
}

EXPORT int bproc_nodereboot(int node)
{
	return bproc_nodesetstatus(node, "reboot");
}

EXPORT int bproc_nodehalt(int node)
{
	return bproc_nodesetstatus(node, "halt");
}

EXPORT int bproc_nodepwroff(int node)
{
	return bproc_nodesetstatus(node, "pwroff");
}

/* The state file answers when the node has been told, which is all that these wait for. */
EXPORT int bproc_nodereboot_async(int node)
{
	return bproc_nodereboot(node);
}

EXPORT int bproc_nodehalt_async(int node)
{
	return bproc_nodehalt(node);
}

EXPORT int bproc_nodepwroff_async(int node)
{
	return bproc_nodepwroff(node);
}

/* A node's root belongs to its image, and it finds its master by itself. */
EXPORT int bproc_nodechroot(int node, char *path)
{
	(void)node, (void)path;
	errno = ENOSYS;
	return -1;
}

EXPORT int bproc_nodereconnect(int node, struct sockaddr *remote, int remote_size, struct sockaddr *local,
			       int local_size)
{
	(void)node, (void)remote, (void)remote_size, (void)local, (void)local_size;
	errno = ENOSYS;
	return -1;
}
