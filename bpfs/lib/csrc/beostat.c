/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Figures of nodes: libbeostat(3). Each call is a read of a file below nodes/N.
 */
#define _GNU_SOURCE
#include "lib.h"
#include "sys/beostat.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FIGURES_ROOM (1 << 17) /* the `stat` of 1,000 processors */

/* The text of nodes/N/NAME, to be freed; NULL with errno, which is BE_NODEDOWN where the node has never told anything. */
static char *figures(int node, const char *name)
{
	char path[PATH_ROOM], *text;
	int length;

	if (node == BPROC_NODE_SELF)
		node = bproc_currnode();
	if (bpfs_path(path, "nodes/%d/%s", node, name) < 0 || !(text = malloc(FIGURES_ROOM)))
		return NULL;
	length = bpfs_read(path, text, FIGURES_ROOM);
	if (length > 0)
		return text;
	if (length == 0)
		errno = BE_NODEDOWN;
	else
		node_error();
	free(text);
	return NULL;
}

/* Reads `wanted` values with sscanf(3) out of nodes/N/NAME. Returns 0, or -1 with errno. */
__attribute__((format(scanf, 4, 5))) static int scan(int node, const char *name, int wanted, const char *format, ...)
{
	char *text = figures(node, name);
	va_list values;
	int found;

	if (!text)
		return -1;
	va_start(values, format);
	found = vsscanf(text, format, values);
	va_end(values);
	free(text);
	if (found >= wanted)
		return 0;
	errno = EPROTO;
	return -1;
}

/* The start of the given line, counted from 0; NULL with EINVAL where there are not so many. */
static char *line_of(char *text, int line)
{
	for (; text && line > 0; line--)
		text = (text = strchr(text, '\n')) ? text + 1 : NULL;
	if (!text || line < 0)
		errno = EINVAL;
	return line < 0 ? NULL : text;
}

EXPORT int beostat_get_loadavg(int node, struct beostat_loadavg *loadavg)
{
	return scan(node, "load", 6, "%f %f %f %d/%d %d", &loadavg->load[0], &loadavg->load[1], &loadavg->load[2],
		    &loadavg->num_active_procs, &loadavg->total_procs, &loadavg->last_pid);
}

/* The bytes behind `key` in lines of "key kB"; 0 where it is not among them. */
static unsigned long long bytes_of(const char *text, const char *key)
{
	size_t length = strlen(key);

	for (; text; text = (text = strchr(text, '\n')) ? text + 1 : NULL)
		if (!strncmp(text, key, length) && text[length] == ' ')
			return 1024 * strtoull(text + length, NULL, 10);
	return 0;
}

EXPORT int beostat_get_meminfo(int node, struct beostat_meminfo *meminfo)
{
	char *text = figures(node, "memory");

	if (!text)
		return -1;
	meminfo->mem.free = bytes_of(text, "MemFree");
	meminfo->mem.used = bytes_of(text, "MemTotal") - meminfo->mem.free;
	meminfo->swap.free = bytes_of(text, "SwapFree");
	meminfo->swap.used = bytes_of(text, "SwapTotal") - meminfo->swap.free;
	meminfo->shared = bytes_of(text, "Shmem");
	meminfo->buffers = bytes_of(text, "Buffers");
	meminfo->cached = bytes_of(text, "Cached");
	free(text);
	return 0;
}

EXPORT int beostat_get_cpu_count(int node, int *cpu_count)
{
	return scan(node, "cpus", 1, "%d", cpu_count);
}

EXPORT int beostat_get_MHz(int node, float *MHz)
{
	return scan(node, "mhz", 1, "%f", MHz);
}

EXPORT float beostat_get_cpu_percent(int node, int cpu)
{
	char *text = figures(node, "busy"), *line = text ? line_of(text, cpu) : NULL;
	float share = line ? strtof(line, NULL) : -1;

	free(text);
	return share;
}

EXPORT int beostat_get_stat_cpu(int node, int cpu, struct beostat_stat_cpu *stat_cpu)
{
	char *text = figures(node, "stat"), *line = text ? line_of(text, cpu < 0 ? cpu : cpu + 1) : NULL; /* the first is of all */
	long user, nice, system, idle, iowait, irq, softirq, steal;
	int found;

	if (!line) {
		free(text);
		return -1;
	}
	found = sscanf(line, "cpu%*d %ld %ld %ld %ld %ld %ld %ld %ld", &user, &nice, &system, &idle, &iowait, &irq,
		       &softirq, &steal);
	free(text);
	if (found != 8) {
		errno = found > 0 ? EPROTO : EINVAL; /* a line of something else: there is no such processor */
		return -1;
	}
	stat_cpu->user = user;
	stat_cpu->nice = nice;
	stat_cpu->system = system + irq + softirq + steal;
	stat_cpu->idle = idle + iowait;
	return 0;
}

EXPORT int beostat_get_name(int node, char **name)
{
	char path[PATH_ROOM], host[256];

	if (node == BPROC_NODE_SELF)
		node = bproc_currnode();
	if (bpfs_path(path, "nodes/%d", node) < 0 || (access(path, F_OK) < 0 && node_error() < 0))
		return -1;
	if (node == BPROC_NODE_MASTER)
		return asprintf(name, "%s", bproc_currnode() == node && !gethostname(host, sizeof host) ? host : "master") < 0
			       ? -1
			       : 0;
	return asprintf(name, "n%d", node) < 0 ? -1 : 0;
}

EXPORT int beostat_get_time(int node, struct node_time *node_time)
{
	long when;

	if (scan(node, "heard", 1, "%ld", &when) < 0)
		return -1;
	node_time->time = when;
	return 0;
}

static int admits(const struct bproc_node_info_t *info, uid_t uid, const gid_t *groups, int count)
{
	unsigned int bit = 0001;

	if (strcmp(info->status, "up"))
		return 0;
	if (uid == 0)
		return 1;
	for (int i = 0; i < count; i++)
		if (groups[i] == info->group)
			bit = 0010;
	if (info->user == uid)
		bit = 0100;
	return (info->mode & bit) != 0;
}

EXPORT int beostat_is_node_available(int node, uid_t uid, gid_t *gid_list, int gid_size)
{
	struct bproc_node_info_t info;

	return bproc_nodeinfo(node, &info) < 0 ? -1 : admits(&info, uid, gid_list, gid_size);
}

EXPORT int beostat_get_avail_nodes_by_id(int **node_list, uid_t uid, gid_t *gid_list, int gid_size)
{
	struct bproc_node_set_t all = BPROC_EMPTY_NODESET;
	int count = 0, *found;

	if (bproc_nodelist(&all) < 0)
		return -1;
	found = calloc((size_t)all.size + 1, sizeof *found);
	for (int i = 0; found && i < all.size; i++)
		if (admits(&all.node[i], uid, gid_list, gid_size))
			found[count++] = all.node[i].node;
	bproc_nodeset_free(&all);
	*node_list = found;
	return found ? count : -1;
}

/* How many lines of nodes/N/busy are below the threshold; none of a node that has just gone. */
static int idle_of(int node, float threshold)
{
	char *text = figures(node, "busy");
	int count = 0;

	for (char *line = text; line; line = (line = strchr(line, '\n')) ? line + 1 : NULL)
		count += strtof(line, NULL) < threshold;
	free(text);
	return count;
}

EXPORT int beostat_count_idle_cpus(float threshold)
{
	int room = getgroups(0, NULL), count, *nodes, idle = 0;
	gid_t *groups = calloc((size_t)(room < 0 ? 0 : room) + 1, sizeof *groups);

	if (!groups)
		return -1;
	room = getgroups(room, groups);
	groups[room < 0 ? room = 0 : room] = getegid();
	count = beostat_get_avail_nodes_by_id(&nodes, geteuid(), groups, room + 1);
	free(groups);
	if (count < 0)
		return -1;
	for (int i = 0; i < count; i++)
		idle += idle_of(nodes[i], threshold);
	free(nodes);
	return idle;
}

/* -- disks and networks ------------------------------------------------------------------------------------------- */

/* The number behind `key` in lines of "key number"; 0 where it is not among them. */
static unsigned long long number_of(const char *text, const char *key)
{
	size_t length = strlen(key);

	for (; text; text = (text = strchr(text, '\n')) ? text + 1 : NULL)
		if (!strncmp(text, key, length) && text[length] == ' ')
			return strtoull(text + length, NULL, 10);
	return 0;
}

EXPORT int beostat_get_statfs_p(int node, struct statfs *statfs)
{
	char *text = figures(node, "disk");

	if (!text)
		return -1;
	memset(statfs, 0, sizeof *statfs);
	statfs->f_type = (__typeof__(statfs->f_type))number_of(text, "type");
	statfs->f_bsize = (__typeof__(statfs->f_bsize))number_of(text, "bsize");
	statfs->f_blocks = number_of(text, "blocks");
	statfs->f_bfree = number_of(text, "bfree");
	statfs->f_bavail = number_of(text, "bavail");
	statfs->f_files = number_of(text, "files");
	statfs->f_ffree = number_of(text, "ffree");
	statfs->f_namelen = (__typeof__(statfs->f_namelen))number_of(text, "namelen");
	free(text);
	return 0;
}

EXPORT int beostat_get_disk_usage(int node, int *max, int *curr)
{
	struct statfs disk;

	if (beostat_get_statfs_p(node, &disk) < 0)
		return -1;
	*max = (int)(disk.f_blocks * (unsigned long long)disk.f_bsize >> 20);
	*curr = (int)((disk.f_blocks - disk.f_bfree) * (unsigned long long)disk.f_bsize >> 20);
	return 0;
}

/* One line of /proc/net/dev; 0 where it is a heading. */
static int read_device(const char *line, struct beostat_net_dev *dev)
{
	memset(dev, 0, sizeof *dev);
	return sscanf(line, " %15[^:]: %lu %lu %lu %lu %lu %lu %lu %lu %lu %lu %lu %lu %lu %lu %lu %lu", dev->name,
		      &dev->recv.bytes, &dev->recv.packets, &dev->recv.errs, &dev->recv.drop, &dev->recv.fifo, &dev->frame,
		      &dev->recv.compressed, &dev->multicast, &dev->trans.bytes, &dev->trans.packets, &dev->trans.errs,
		      &dev->trans.drop, &dev->trans.fifo, &dev->colls, &dev->carrier, &dev->trans.compressed) == 17;
}

EXPORT int beostat_get_net_dev(int node, struct beostat_net_dev *devs, int size)
{
	char *text = figures(node, "netdev"), *state = NULL;
	int count = 0;

	if (!text)
		return -1;
	if (size > MAX_NET_DEV)
		size = MAX_NET_DEV;
	for (char *line = strtok_r(text, "\n", &state); line && count < size; line = strtok_r(NULL, "\n", &state))
		count += read_device(line, &devs[count]);
	if (count < size)
		memset(devs + count, 0, (size_t)(size - count) * sizeof *devs);
	free(text);
	return 0;
}

#define FIRST_MS 200   /* between the two looks of a first call */
#define OLD_MS 60000   /* a look that is older says nothing of now */

struct look {
	struct look *next;
	int node;
	long long when; /* ms; 0: never */
	unsigned long long bytes;
};

/* What a node's devices but the loopback have carried by now. */
static int look_at_net(int node, struct look *look)
{
	char *text = figures(node, "netdev"), *state = NULL;
	struct beostat_net_dev dev;
	struct timespec time;

	if (!text)
		return -1;
	clock_gettime(CLOCK_MONOTONIC, &time);
	look->when = time.tv_sec * 1000LL + time.tv_nsec / 1000000;
	look->bytes = 0;
	for (char *line = strtok_r(text, "\n", &state); line; line = strtok_r(NULL, "\n", &state))
		if (read_device(line, &dev) && strcmp(dev.name, "lo"))
			look->bytes += dev.recv.bytes + dev.trans.bytes;
	free(text);
	return 0;
}

static struct look *last_look(int node)
{
	static struct look *looks;
	struct look *found = looks;

	while (found && found->node != node)
		found = found->next;
	if (!found && (found = calloc(1, sizeof *found))) {
		found->node = node;
		found->next = looks;
		looks = found;
	}
	return found;
}

EXPORT unsigned long beostat_get_net_rate(int node)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	struct look now = { 0 }, *last;
	unsigned long rate = (unsigned long)-1;

	pthread_mutex_lock(&lock);
	last = last_look(node);
	if (!last || look_at_net(node, &now) < 0)
		goto out;
	if (!last->when || now.when - last->when > OLD_MS || now.when - last->when < FIRST_MS) {
		if (!last->when || now.when - last->when > OLD_MS)
			last->when = now.when, last->bytes = now.bytes;
		nanosleep(&(struct timespec){ .tv_nsec = FIRST_MS * 1000000L }, NULL);
		if (look_at_net(node, &now) < 0)
			goto out;
	}
	rate = now.bytes > last->bytes ? (unsigned long)((now.bytes - last->bytes) * 1000 / (now.when - last->when)) : 0;
	last->when = now.when;
	last->bytes = now.bytes;
out:
	pthread_mutex_unlock(&lock);
	return rate;
}
