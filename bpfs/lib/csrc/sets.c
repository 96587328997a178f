/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Sets of nodes: libbproc(3).
 */
#define _GNU_SOURCE
#include "lib.h"
#include "../../cli/csrc/nodespec.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

EXPORT int bproc_nodeset_init(struct bproc_node_set_t *set, int size)
{
	memset(set, 0, sizeof *set);
	return size > 0 ? bproc_nodeset_grow(set, size) : 0;
}

EXPORT int bproc_nodeset_grow(struct bproc_node_set_t *set, int size)
{
	struct bproc_node_info_t *more;

	if (size < 0) {
		errno = EINVAL;
		return -1;
	}
	if (size <= set->alloc)
		return 0;
	more = reallocarray(set->node, (size_t)size, sizeof *more);
	if (!more)
		return -1;
	memset(more + set->alloc, 0, (size_t)(size - set->alloc) * sizeof *more);
	set->node = more;
	set->alloc = size;
	return 0;
}

EXPORT void bproc_nodeset_free(struct bproc_node_set_t *set)
{
	free(set->node);
	memset(set, 0, sizeof *set);
}

EXPORT int bproc_nodeset_add(struct bproc_node_set_t *set, struct bproc_node_info_t *info)
{
	if (set->size == set->alloc && bproc_nodeset_grow(set, set->alloc ? 2 * set->alloc : 16) < 0)
		return -1;
	set->node[set->size++] = *info;
	return 0;
}

EXPORT int bproc_nodeset_append(struct bproc_node_set_t *set, struct bproc_node_set_t *more)
{
	int count = more->size;

	if (bproc_nodeset_grow(set, set->size + count) < 0)
		return -1;
	for (int i = 0; i < count; i++)
		set->node[set->size++] = more->node[i];
	return 0;
}

static int expand(const char *spec, struct numbers *found)
{
	char error[256];

	if (no_cluster() < 0)
		return -1;
	if (!spec || nodespec_expand(bpfs_mount(), spec, found, error, sizeof error) < 0) {
		free(found->number);
		errno = EINVAL;
		return -1;
	}
	return 0;
}

EXPORT int bproc_nodespec(struct bproc_node_set_t *set, const char *nodespec)
{
	struct numbers found = { 0 };
	struct bproc_node_info_t info;
	int result = 0;

	if (expand(nodespec, &found) < 0)
		return -1;
	set->size = 0;
	for (size_t i = 0; i < found.count && result == 0; i++) {
		result = bproc_nodeinfo(found.number[i], &info);
		if (result == 0)
			result = bproc_nodeset_add(set, &info);
	}
	free(found.number);
	return result < 0 ? -1 : set->size;
}

EXPORT int bproc_nodefilter(struct bproc_node_set_t *out, struct bproc_node_set_t *in, const char *nodespec)
{
	struct numbers found = { 0 };

	if (expand(nodespec, &found) < 0)
		return -1;
	out->size = 0;
	for (size_t i = 0; i < found.count; i++)
		for (int j = 0; j < in->size; j++)
			if (in->node[j].node == found.number[i] && bproc_nodeset_add(out, &in->node[j]) < 0) {
				free(found.number);
				return -1;
			}
	free(found.number);
	return out->size;
}
