/* Births by order: a packet says which placeholders are missing, and which system calls turn the child that is born
 * under them into the job. The last one is its exec. Nobody traces it, and nothing is copied: see engine/execorder.py,
 * which writes the calls on the master, and engine/bearing.py, which sends them on the node.
 *
 * A part of nodeinit.c, whose helpers it uses.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later */

#define ORDER_BYTES (256UL << 10) /* of the longest packet; only what is filled takes memory */
#define ORDER_FDS 250
#define MSG_CMSG_CLOEXEC_ 0x40000000
#define SCM_RIGHTS_ 1
#define STRINGS_END (~0UL)
#define NO_CHILD (-2) /* instead of the row that failed */

static int orders = -1; /* where packets come from */

struct message {
	void *name;
	uint64_t name_length;
	struct {
		void *base;
		uint64_t length;
	} *parts;
	uint64_t part_count;
	void *control;
	uint64_t control_length;
	int32_t flags;
};

struct passed {
	uint64_t length;
	int32_t level, type;
	int32_t fd[ORDER_FDS];
};

/* One that has been received. The first descriptor is where its failure is told; closed by the exec it tells the opposite. */
struct birth {
	struct birth_head head;
	struct birth_table table;
};

static struct birth *order;
static struct passed passed;
static int passed_count;

/* Another placeholder than those that descend from pid 1: one that was a job. */
static void find_orders(void)
{
	long init = call(__NR_pidfd_open, 1, 0);
	if (init < 0)
		return;
	orders = (int)call(__NR_pidfd_getfd, init, ORDERS_FD, 0);
	call(__NR_close, init);
}

static void open_orders(void)
{
	int32_t pair[2];
	if (call(__NR_socketpair, AF_UNIX_, SOCK_SEQPACKET_ | O_CLOEXEC, 0, pair))
		return;
	orders = (int)call(__NR_dup3, pair[0], ORDERS_FD, O_CLOEXEC);
	call(__NR_dup3, pair[1], ORDERS_FD + 1, O_CLOEXEC);
	call(__NR_close, pair[0]);
	call(__NR_close, pair[1]);
}

static void drop_order(void)
{
	for (int i = 0; i < passed_count; i++)
		call(__NR_close, passed.fd[i]);
	call(__NR_munmap, order, ORDER_BYTES);
	passed_count = 0;
}

static int is_whole(long length)
{
	uint64_t rows = (uint64_t)order->table.files * sizeof(struct birth_file) +
			(uint64_t)order->table.rows * sizeof(struct birth_row);
	return length >= (long)sizeof *order && order->head.magic == BIRTH_MAGIC && passed_count > 0 &&
	       order->head.links <= BIRTH_LINKS && sizeof *order + rows <= (uint64_t)length;
}

static int receive_order(void)
{
	long at = call(__NR_mmap, 0, ORDER_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at < 0)
		return 0;
	order = (struct birth *)at;
	__typeof__(*((struct message *)0)->parts) part = {order, ORDER_BYTES};
	struct message message = {.parts = &part, .part_count = 1, .control = &passed, .control_length = sizeof passed};
	passed.length = 0;
	passed_count = 0;
	long length = call(__NR_recvmsg, orders, &message, MSG_DONTWAIT_ | MSG_CMSG_CLOEXEC_);
	if (length > 0 && message.control_length && passed.level == SOL_SOCKET_ && passed.type == SCM_RIGHTS_)
		passed_count = (int)(passed.length - 16) / 4;
	if (is_whole(length))
		return 1;
	drop_order();
	return 0;
}

static void tell_failure(int fd, long error, int row)
{
	int32_t told[2] = {(int32_t)-error, row};
	call(__NR_write, fd, told, sizeof told);
}

/* The daemon kills us when it has made a note that this end is not to be told. */
static _Noreturn void fail_birth(int fd, long error, int row)
{
	uint64_t every = EVERY_SIGNAL;
	call(__NR_rt_sigprocmask, SIG_BLOCK, &every, 0, sizeof every);
	tell_failure(fd, error, row);
	for (;;)
		call(__NR_pause, 0);
}

/* ---- the job ------------------------------------------------------------------------------------ */

/* Whether a file here is the one that the order speaks of, as engine/restore_files.py has it. */
static long check_file(const struct birth_file *wanted)
{
	struct statx found;
	long error = call(__NR_statx, AT_FDCWD, (char *)&order->table + wanted->path, AT_SYMLINK_NOFOLLOW,
			  STATX_BASIC_STATS, &found);
	if (error)
		return error;
	uint64_t mtime = (uint64_t)found.stx_mtime.tv_sec * 1000000000 + found.stx_mtime.tv_nsec;
	if ((found.stx_mode & S_IFMT) != S_IFREG || found.stx_size != wanted->size || mtime != wanted->mtime_ns)
		return -ESTALE;
	if (found.stx_dev_major == wanted->major && found.stx_dev_minor == wanted->minor && found.stx_ino == wanted->inode)
		return 0;
	return found.stx_dev_major || wanted->major ? -ESTALE : 0;
}

/* Above all numbers that the job is going to have. */
static void move_descriptors(int high)
{
	int status = passed.fd[0];
	for (int i = 0; i < passed_count; i++) {
		long moved = call(__NR_fcntl, passed.fd[i], F_DUPFD_CLOEXEC, high);
		if (moved < 0)
			fail_birth(status, moved, -1);
		passed.fd[i] = (int)moved;
	}
	call(__NR_close_range, 0, high - 1, 0);
}

static long address_of(uint64_t offset)
{
	return (long)&order->table + (long)offset;
}

static long vector_of(uint64_t offset)
{
	uint64_t *strings = (uint64_t *)address_of(offset), *at = strings;
	for (; *at != STRINGS_END; at++)
		*at = (uint64_t)address_of(*at);
	*at = 0;
	return (long)strings;
}

static long make_call(const struct birth_row *row, long opened)
{
	long argument[6];
	for (int i = 0; i < 6; i++) {
		uint64_t value = row->argument[i];
		switch (row->kind[i]) {
		case ARGUMENT_ADDRESS: argument[i] = address_of(value); break;
		case ARGUMENT_STRINGS: argument[i] = vector_of(value); break;
		case ARGUMENT_OPENED: argument[i] = opened; break;
		case ARGUMENT_PASSED: argument[i] = value + 1 < (uint64_t)passed_count ? passed.fd[value + 1] : -1; break;
		default: argument[i] = (long)value;
		}
	}
	return call6(row->number, argument[0], argument[1], argument[2], argument[3], argument[4], argument[5]);
}

static _Noreturn void become_job(void)
{
	const struct birth_file *file = (struct birth_file *)(order + 1);
	const struct birth_row *row = (struct birth_row *)(file + order->table.files);
	long opened = -1, result = 0;
	if (order->head.how & COMMAND_SETSID)
		call(__NR_setsid, 0);
	if (order->head.pgid)
		result = call(__NR_setpgid, 0, order->head.pgid);
	if (result)
		fail_birth(passed.fd[0], result, -1);
	move_descriptors((int)order->table.high);
	for (uint32_t i = 0; i < order->table.files; i++)
		if ((result = check_file(&file[i])))
			fail_birth(passed.fd[0], result, -1);
	for (uint32_t i = 0; i < order->table.rows; i++) {
		result = make_call(&row[i], opened);
		if (row[i].number == __NR_open)
			opened = result;
		if (result < 0 && row[i].must)
			fail_birth(passed.fd[0], result, (int)i);
	}
	fail_birth(passed.fd[0], -ENOEXEC, (int)order->table.rows);
}

/* ---- those who make it ---------------------------------------------------------------------------- */

static void lead(uint64_t how)
{
	if (how & COMMAND_SETSID)
		call(__NR_setsid, 0);
	if (how & COMMAND_SETPGID)
		call(__NR_setpgid, 0, 0);
}

/* Each missing placeholder makes the next one, unless it stands aside, and the last of them the job. Returns in each, the
 * job excepted. */
static void bear(void)
{
	if (orders < 0)
		find_orders();
	if (orders < 0 || !receive_order())
		return;
	for (uint32_t i = 0; i < order->head.links; i++) {
		uint64_t how = order->head.link[i].how;
		long made = clone_placeholder(order->head.link[i].pid, how);
		if (!made) {
			call(__NR_setresuid, order->head.uid, 0, 0);
			lead(how);
		} else if (made > 0 && how & COMMAND_SETPGID) {
			call(__NR_setpgid, made, made); /* in case that we are faster than it is */
		}
		if (made < 0)
			tell_failure(passed.fd[0], made, NO_CHILD);
		if (made < 0 || !made == !!(how & BIRTH_ASIDE)) {
			drop_order();
			return; /* another one goes on, or nobody */
		}
	}
	long made = clone_placeholder(order->head.pid, order->head.how & COMMAND_SIBLING);
	if (!made)
		become_job();
	if (made < 0)
		tell_failure(passed.fd[0], made, NO_CHILD);
	drop_order();
}
