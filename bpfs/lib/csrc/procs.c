/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Where processes are: libbproc(3).
 */
#define _GNU_SOURCE
#include "lib.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

EXPORT int bproc_proclist(int node, struct bproc_proc_info_t **list)
{
	char path[PATH_ROOM], *end;
	struct bproc_proc_info_t *found = NULL, *more;
	int count = 0, room = 0;
	struct dirent *entry;
	DIR *directory;

	node = real_node(node);
	if (bpfs_path(path, "nodes/%d/procs", node) < 0)
		return -1;
	directory = opendir(path);
	if (!directory)
		return node_error();
	while ((entry = readdir(directory))) {
		long pid = strtol(entry->d_name, &end, 10);

		if (pid <= 0 || *end)
			continue;
		if (count == room) {
			more = reallocarray(found, (size_t)(room = room ? 2 * room : 32), sizeof *more);
			if (!more) {
				free(found);
				closedir(directory);
				return -1;
			}
			found = more;
		}
		found[count++] = (struct bproc_proc_info_t){ .pid = (int)pid, .node = node };
	}
	closedir(directory);
	*list = found ? found : malloc(1); /* to be freed in any case */
	return count;
}

EXPORT int bproc_pidnode(int pid)
{
	char path[PATH_ROOM], text[32];

	if (bpfs_path(path, "procs/%d/node", pid) < 0)
		return -1;
	for (;;) {
		if (bpfs_read(path, text, sizeof text) < 0) {
			if (errno == ENOENT && no_cluster() == 0)
				errno = BE_INVALIDPROC;
			return -1;
		}
		if (strcmp(text, "migrating")) {
			errno = 0; /* -1 is the master, too */
			return atoi(text);
		}
		nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
	}
}
