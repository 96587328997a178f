/* Checks the figures of nodes; three nodes, all up, run by root. */
#define _GNU_SOURCE
#include "check.h"

#include <sched.h>
#include <sys/beostat.h>
#include <sys/sysinfo.h>
#include <time.h>

/* A node tells its figures a moment after it is up. */
static void wait_for_figures(void)
{
	int count;

	for (int node = 0; node < 3; node++)
		for (int tries = 0; beostat_get_cpu_count(node, &count) < 0; tries++) {
			CHECK(errno == BE_NODEDOWN && tries < 2000);
			usleep(10000);
		}
}

static void load_and_memory(void)
{
	struct beostat_loadavg load;
	struct beostat_meminfo memory;
	struct sysinfo here;

	CHECK(beostat_get_loadavg(1, &load) == 0);
	CHECK(load.load[0] >= 0 && load.load[2] >= 0 && load.num_active_procs >= 1 && load.last_pid > 1);
	CHECK(load.total_procs >= load.num_active_procs);
	CHECK(beostat_get_meminfo(1, &memory) == 0 && sysinfo(&here) == 0);
	/* A virtual node has the memory of this machine. */
	CHECK(memory.mem.used + memory.mem.free == here.totalram * here.mem_unit);
	CHECK(memory.swap.used + memory.swap.free == here.totalswap * here.mem_unit);
	CHECK(memory.mem.used > memory.cached && memory.cached > memory.shared);
	CHECK(beostat_get_meminfo(BPROC_NODE_MASTER, &memory) == 0 && memory.mem.free > 0);
	CHECK(beostat_get_meminfo(7, &memory) == -1 && errno == BE_INVALIDNODE);
	CHECK(beostat_get_loadavg(7, &load) == -1 && errno == BE_INVALIDNODE);
}

static void processors(void)
{
	struct beostat_stat_cpu ticks;
	int count, all = 0, each;
	float share, clock;
	cpu_set_t mine;

	CHECK(sched_getaffinity(0, sizeof mine, &mine) == 0);
	CHECK(beostat_get_cpu_count(2, &count) == 0 && count == CPU_COUNT(&mine));
	for (int cpu = 0; cpu < count; cpu++) {
		share = beostat_get_cpu_percent(2, cpu);
		CHECK(share >= 0 && share <= 1);
		CHECK(beostat_get_stat_cpu(2, cpu, &ticks) == 0 && ticks.user > 0 && ticks.system > 0 && ticks.idle > 0);
	}
	CHECK(beostat_get_cpu_percent(2, count) == -1 && errno == EINVAL);
	CHECK(beostat_get_cpu_percent(2, -1) == -1 && errno == EINVAL);
	CHECK(beostat_get_cpu_percent(7, 0) == -1 && errno == BE_INVALIDNODE);
	CHECK(beostat_get_stat_cpu(2, count, &ticks) == -1 && errno == EINVAL);
	CHECK(beostat_get_cpu_percent(BPROC_NODE_SELF, 0) >= 0);
	if (beostat_get_MHz(0, &clock) < 0)
		CHECK(errno == BE_NODEDOWN); /* this kernel does not say */
	else
		CHECK(clock > 100);
	for (int node = 0; node < 3; node++) {
		CHECK(beostat_get_cpu_count(node, &each) == 0);
		all += each;
	}
	CHECK(beostat_count_idle_cpus(9999) == all && beostat_count_idle_cpus(-1) == 0);
}

static void who_and_when(void)
{
	struct node_time when;
	gid_t group = 4242;
	char *name, host[256];
	int *nodes;

	CHECK(beostat_get_name(2, &name) == 0 && !strcmp(name, "n2"));
	free(name);
	CHECK(gethostname(host, sizeof host) == 0 && beostat_get_name(BPROC_NODE_MASTER, &name) == 0 && !strcmp(name, host));
	free(name);
	CHECK(beostat_get_name(3, &name) == -1 && errno == BE_INVALIDNODE);
	CHECK(beostat_get_time(0, &when) == 0 && time(NULL) - when.time < 60 && when.time <= time(NULL));

	CHECK(bproc_chmod(1, 0010) == 0 && bproc_chgrp(1, 4242) == 0);
	CHECK(beostat_is_node_available(1, 1300, NULL, 0) == 0 && beostat_is_node_available(0, 1300, NULL, 0) == 1);
	CHECK(beostat_is_node_available(1, 1300, &group, 1) == 1 && beostat_is_node_available(1, 0, NULL, 0) == 1);
	CHECK(beostat_is_node_available(5, 1300, NULL, 0) == -1 && errno == BE_INVALIDNODE);
	CHECK(beostat_get_avail_nodes_by_id(&nodes, 1300, NULL, 0) == 2 && nodes[0] == 0 && nodes[1] == 2);
	free(nodes);
	CHECK(bproc_nodesetstatus(2, "unavailable") == 0);
	CHECK(beostat_get_avail_nodes_by_id(&nodes, 1300, &group, 1) == 2 && nodes[0] == 0 && nodes[1] == 1);
	free(nodes);
	CHECK(bproc_nodesetstatus(2, "up") == 0 && bproc_chmod(1, 0111) == 0 && bproc_chgrp(1, 0) == 0);
}

/* The nodes of this test share root file system and network with the master. */
static void disks_and_networks(void)
{
	struct beostat_net_dev devices[MAX_NET_DEV + 1];
	struct statfs disk, own;
	int most, used, loopback = -1;

	CHECK(statfs("/", &own) == 0 && beostat_get_statfs_p(0, &disk) == 0);
	CHECK(disk.f_type == own.f_type && disk.f_bsize == own.f_bsize && disk.f_blocks == own.f_blocks);
	CHECK(disk.f_files == own.f_files && disk.f_namelen == own.f_namelen && disk.f_bfree <= disk.f_blocks);
	CHECK(beostat_get_disk_usage(BPROC_NODE_MASTER, &most, &used) == 0 && used <= most);
	CHECK(most == (int)(own.f_blocks * (unsigned long long)own.f_bsize >> 20));
	CHECK(beostat_get_statfs_p(9, &disk) == -1 && errno == BE_INVALIDNODE);

	memset(devices, 0xff, sizeof devices);
	CHECK(beostat_get_net_dev(1, devices, MAX_NET_DEV + 1) == 0 && (signed char)devices[MAX_NET_DEV].name[0] == -1);
	for (int i = 0; i < MAX_NET_DEV; i++)
		if (!strcmp(devices[i].name, "lo"))
			loopback = i;
	/* What goes over it comes, and the cluster's own messages do so all the time. */
	CHECK(loopback >= 0 && devices[loopback].recv.bytes > 0 && devices[loopback].recv.bytes == devices[loopback].trans.bytes);
	CHECK(devices[loopback].recv.packets > 0 && devices[loopback].recv.packets == devices[loopback].trans.packets);
	CHECK(beostat_get_net_dev(9, devices, 1) == -1 && errno == BE_INVALIDNODE);
	CHECK(beostat_get_net_rate(0) != (unsigned long)-1 && beostat_get_net_rate(BPROC_NODE_SELF) < 1ul << 40);
	CHECK(beostat_get_net_rate(9) == (unsigned long)-1 && errno == BE_INVALIDNODE);
}

int main(void)
{
	wait_for_figures();
	load_and_memory();
	processors();
	who_and_when();
	disks_and_networks();
	return 0;
}
