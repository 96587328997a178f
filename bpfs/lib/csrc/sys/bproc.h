/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The interface that programs written for BProc 4 expect, over /bpfs. See libbproc(3).
 *
 * A node is its number, BPROC_NODE_MASTER the master, BPROC_NODE_SELF the one that the caller is on. Calls return 0, or
 * what their page says, and -1 with errno, which may be one of the BE_ codes.
 */
#ifndef _SYS_BPROC_H
#define _SYS_BPROC_H

#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BPROC_API_VERSION 4

#define BPROC_NODE_MASTER (-1)
#define BPROC_NODE_SELF (-2)
#define BPROC_NODE_NONE (-3)
#define BPROC_NODE_ANY (-4)

#define BPROC_STATE_LEN 15

/* What BProc had in an image beyond what the process changed. Here all flags give the same: files are named, and the
 * node has their contents. */
#define BPROC_DUMP_LIBS 1
#define BPROC_DUMP_EXEC 2
#define BPROC_DUMP_OTHER 4
#define BPROC_DUMP_ALL 7

/* Extended attributes of nodes/N. */
#define BPROC_XATTR_PREFIX "bproc."
#define BPROC_STATE_XATTR "bproc.state"
#define BPROC_ADDR_XATTR "bproc.addr"
#define BPROC_XATTR_MAX_NAME_SIZE 63
#define BPROC_XATTR_MAX_VALUE_SIZE 64
#define BPROC_XATTR_MAX 32

/* Errors beyond those of errno.h. */
#define BE_BASE 300
#define BE_INVALIDNODE 300 /* there is no such node */
#define BE_NODEDOWN 301	   /* the node is not up */
#define BE_SAMENODE 302	   /* the process is there already (not used: that is success) */
#define BE_SLAVEDIED 303   /* the node was lost on the way */
#define BE_INVALIDPROC 304 /* there is no such process */

#define BPROC_X_OK 1 /* for bproc_access: may migrate there */

struct bproc_node_info_t {
	int node;
	char status[BPROC_STATE_LEN + 1];
	unsigned int mode, user, group;
	struct sockaddr addr;
	time_t atime, mtime;
};

struct bproc_node_set_t {
	int size, alloc;
	struct bproc_node_info_t *node;
};

#define BPROC_EMPTY_NODESET { 0, 0, 0 }
#define bproc_node_set_node(set, i) (&(set)->node[i])

struct bproc_proc_info_t {
	int pid, node;
};

struct bproc_version_t {
	int magic;
	int arch;
	int number;
	char version_string[24];
};

#define BPROC_MAGIC 0x42504653 /* "BPFS" */
#define BPROC_ARCH_X86_64 6

/* What a process that is moved gets for a descriptor, on its node. */
#define BPROC_IO_MAX_LEN 16
#define BPROC_IO_MAX BPROC_IO_MAX_LEN
#define BPROC_IO_FILE 0
#define BPROC_IO_SOCKET 1
#define BPROC_IO_MEMFILE 2
#define BPROC_IO_SEND_INFO 1 /* pid and descriptor number come first on the socket, 4 bytes each */
#define BPROC_IO_DELAY 2     /* made when the program runs: what fails then ends it */

struct bproc_io_t {
	int fd;
	short type, flags;
	union {
		struct sockaddr addr; /* AF_INET; address 0: the node that the caller came from */
		struct {
			int flags, mode;
			long offset;
			char name[256];
		} file;
		struct {
			void *base;
			long size;
		} mem;
	} d;
};

/* Nodes: libbproc(3). */
int bproc_numnodes(void);
int bproc_currnode(void);
int bproc_nodestatus(int node, char *status, int len);
int bproc_nodeaddr(int node, struct sockaddr *addr, int *size);
int bproc_nodeinfo(int node, struct bproc_node_info_t *info);
int bproc_nodelist(struct bproc_node_set_t *set);
int bproc_nodelist_(struct bproc_node_set_t *set, int fd);
int bproc_notifier(void);
int bproc_getnodeattr(int node, char *name, void *value, int size);
int bproc_setnodeattr(int node, char *name, void *value, int size);
int bproc_version(struct bproc_version_t *version);
const char *bproc_strerror(int error);

/* Sets of nodes: libbproc(3). */
int bproc_nodeset_init(struct bproc_node_set_t *set, int size);
int bproc_nodeset_grow(struct bproc_node_set_t *set, int size);
void bproc_nodeset_free(struct bproc_node_set_t *set);
int bproc_nodeset_add(struct bproc_node_set_t *set, struct bproc_node_info_t *info);
int bproc_nodeset_append(struct bproc_node_set_t *set, struct bproc_node_set_t *more);
int bproc_nodefilter(struct bproc_node_set_t *out, struct bproc_node_set_t *in, const char *nodespec);
int bproc_nodespec(struct bproc_node_set_t *set, const char *nodespec);

/* Rights and administration: libbproc(3). */
int bproc_chmod(int node, int mode);
int bproc_chown(int node, int user);
int bproc_chgrp(int node, int group);
int bproc_access(int node, int mode);
int bproc_nodesetstatus(int node, char *status);
int bproc_nodereboot(int node);
int bproc_nodehalt(int node);
int bproc_nodepwroff(int node);
int bproc_nodereboot_async(int node);
int bproc_nodehalt_async(int node);
int bproc_nodepwroff_async(int node);
int bproc_nodechroot(int node, char *path);
int bproc_nodereconnect(int node, struct sockaddr *remote, int remote_size, struct sockaddr *local, int local_size);

/* Processes: libbproc(3). */
int bproc_proclist(int node, struct bproc_proc_info_t **list);
int bproc_pidnode(int pid);

/* Moving: libbproc(3). */
int bproc_move(int node);
int bproc_move_io(int node, struct bproc_io_t *io, int iolen);
int _bproc_move(int node, int flags);
int _bproc_move_io(int node, struct bproc_io_t *io, int iolen, int flags);
int bproc_rfork(int node);
int bproc_rfork_io(int node, struct bproc_io_t *io, int iolen);
int _bproc_rfork(int node, int flags);
int _bproc_rfork_io(int node, struct bproc_io_t *io, int iolen, int flags);
int bproc_vrfork(int n, int *nodes, int *pids);
int bproc_vrfork_io(int n, int *nodes, int *pids, struct bproc_io_t *io, int iolen);
int _bproc_vrfork(int n, int *nodes, int *pids, int flags);
int _bproc_vrfork_io(int n, int *nodes, int *pids, struct bproc_io_t *io, int iolen, int flags);
int bproc_execmove(int node, const char *cmd, char *const argv[], char *const envp[]);
int bproc_execmove_io(int node, struct bproc_io_t *io, int iolen, const char *cmd, char *const argv[],
		      char *const envp[]);
int bproc_vexecmove(int n, int *nodes, int *pids, const char *cmd, char *const argv[], char *const envp[]);
int bproc_vexecmove_io(int n, int *nodes, int *pids, struct bproc_io_t *io, int iolen, const char *cmd,
		       char *const argv[], char *const envp[]);
int bproc_rexec(int node, const char *cmd, char *const argv[], char *const envp[]);
int bproc_rexec_io(int node, struct bproc_io_t *io, int iolen, const char *cmd, char *const argv[], char *const envp[]);
int bproc_execve(const char *cmd, char *const argv[], char *const envp[]);

/* Images and libraries: libbproc(3). */
int bproc_dump(int fd, int flags);
int bproc_undump(int fd);
int bproc_execdump(int fd, int flags, const char *cmd, char *const argv[], char *const envp[]);
int bproc_libadd(const char *name);
int bproc_libdel(const char *name);
int bproc_liblist(char **list);
int bproc_libclear(void);

#ifdef __cplusplus
}
#endif

#endif
