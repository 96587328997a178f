/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Figures of nodes as Scyld's library gave them, over /bpfs. See libbeostat(3).
 *
 * A node is its number, -1 the master, -2 the one that the caller is on. Calls return 0, or what their page says, and -1
 * with errno, which may be one of the BE_ codes of <sys/bproc.h>.
 */
#ifndef _SYS_BEOSTAT_H
#define _SYS_BEOSTAT_H

#include <sys/types.h>
#include <sys/vfs.h>
#include <time.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MAX_NET_DEV 8

struct beostat_loadavg {
	float load[3]; /* over 1, 5 and 15 minutes */
	int num_active_procs, total_procs, last_pid;
};

struct beostat_memusage {
	unsigned long long used, free; /* bytes */
};

struct beostat_meminfo {
	struct beostat_memusage mem, swap;
	unsigned long long shared, buffers, cached; /* bytes */
};

struct beostat_stat_cpu {
	long user, system, nice, idle; /* ticks of 1/100 s since the node started */
};

struct node_time {
	time_t time;
};

struct beostat_net_stat {
	unsigned long bytes, packets, errs, drop, fifo, compressed;
};

struct beostat_net_dev {
	char name[16];
	struct beostat_net_stat recv;
	unsigned long frame, multicast;
	struct beostat_net_stat trans;
	unsigned long colls, carrier;
};

/* Load and memory. */
int beostat_get_loadavg(int node, struct beostat_loadavg *loadavg);
int beostat_get_meminfo(int node, struct beostat_meminfo *meminfo);

/* Processors, counted from 0. */
int beostat_get_cpu_count(int node, int *cpu_count);
int beostat_get_MHz(int node, float *MHz);
float beostat_get_cpu_percent(int node, int cpu);
int beostat_get_stat_cpu(int node, int cpu, struct beostat_stat_cpu *stat_cpu);
int beostat_count_idle_cpus(float threshold);

/* Who, when, and for whom. */
int beostat_get_name(int node, char **name);
int beostat_get_time(int node, struct node_time *node_time);
int beostat_is_node_available(int node, uid_t uid, gid_t *gid_list, int gid_size);
int beostat_get_avail_nodes_by_id(int **node_list, uid_t uid, gid_t *gid_list, int gid_size);

/* Disks and networks. */
int beostat_get_disk_usage(int node, int *max, int *curr);
int beostat_get_statfs_p(int node, struct statfs *statfs);
int beostat_get_net_dev(int node, struct beostat_net_dev *devs, int size);
unsigned long beostat_get_net_rate(int node);

#ifdef __cplusplus
}
#endif
#endif
