/* Checks: memory that is written, mapped, unmapped, moved, grown, protected, discarded and forked all the time, against
 * a table of what each page must hold; and a log whose every entry has a checksum over the one before.
 * writer STOP MEGABYTES PAGES-A-MS [churn] [forks] [threads] */
#include "victim.h"
#include <pthread.h>
#include <sys/wait.h>

#define PAGE 4096u
#define BLOCKS 24
#define MOST 1024u /* pages of a block */

static uint64_t state = 88172645463325252u;

static uint64_t chance(uint64_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state % below;
}

/* A page holds its version in every eighth word, or nothing but zeros (version 0). */
static void fill(unsigned char *page, uint64_t version)
{
	for (unsigned i = 0; i < PAGE / 8; i += 8)
		((uint64_t *)page)[i] = version;
}

static void check(const unsigned char *page, uint64_t version)
{
	for (unsigned i = 0; i < PAGE / 8; i += 8)
		CHECK(((const uint64_t *)page)[i] == version);
}

static uint64_t next_version = 1;

struct block {
	unsigned char *at;
	size_t pages;
	int readonly;
	uint64_t version[MOST];
};

static struct block blocks[BLOCKS];

static void map_block(struct block *b, void *where)
{
	b->pages = 32 + chance(MOST - 32);
	int fixed = where ? MAP_FIXED_NOREPLACE : 0;
	b->at = mmap(where, b->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0);
	if (b->at == MAP_FAILED && where)
		b->at = mmap(NULL, b->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(b->at != MAP_FAILED);
	b->readonly = 0;
	memset(b->version, 0, sizeof b->version);
}

static void write_some(struct block *b)
{
	if (b->readonly)
		return;
	for (size_t i = chance(b->pages), end = i + chance(64); i < end && i < b->pages; i++) {
		b->version[i] = next_version++;
		fill(b->at + i * PAGE, b->version[i]);
	}
}

static void resize(struct block *b)
{
	size_t pages = 32 + chance(MOST - 32);
	void *at = mremap(b->at, b->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
	CHECK(at != MAP_FAILED);
	b->at = at;
	for (size_t i = b->pages; i < pages; i++)
		b->version[i] = 0;
	b->pages = pages;
}

static void move_block(struct block *b)
{
	void *hole = mmap(NULL, b->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(hole != MAP_FAILED);
	CHECK(mremap(b->at, b->pages * PAGE, b->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, hole) == hole);
	b->at = hole;
}

static void discard(struct block *b)
{
	size_t first = chance(b->pages), count = chance(b->pages - first) + 1;
	CHECK(!madvise(b->at + first * PAGE, count * PAGE, MADV_DONTNEED));
	memset(b->version + first, 0, count * sizeof b->version[0]);
}

static void protect(struct block *b)
{
	b->readonly = !b->readonly;
	CHECK(!mprotect(b->at, b->pages * PAGE, b->readonly ? PROT_READ : PROT_READ | PROT_WRITE));
}

static void replace(struct block *b)
{
	void *where = b->at;
	CHECK(!munmap(b->at, b->pages * PAGE));
	map_block(b, where);
}

static void check_block(const struct block *b)
{
	for (size_t i = 0; i < b->pages; i++)
		check(b->at + i * PAGE, b->version[i]);
}

static void fork_and_check(struct block *b)
{
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		check_block(b);
		_exit(5);
	}
	int status;
	CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 5);
}

static void churn(int forks)
{
	struct block *b = &blocks[chance(BLOCKS)];
	switch (chance(forks ? 40 : 39)) {
	case 0: case 1: resize(b); break;
	case 2: move_block(b); break;
	case 3: case 4: discard(b); break;
	case 5: case 6: protect(b); break;
	case 7: replace(b); break;
	case 39: fork_and_check(b); break;
	default: write_some(b);
	}
	check_block(&blocks[chance(BLOCKS)]);
}

struct entry {
	uint64_t number, page, version, sum;
};

static uint64_t mix(uint64_t sum, const struct entry *e)
{
	return (sum ^ e->number ^ e->page << 20 ^ e->version << 40) * 1099511628211u + 1;
}

static int over;

static void *idle(void *argument)
{
	volatile unsigned char *mine = malloc(1 << 20);
	for (unsigned n = 0; !__atomic_load_n(&over, __ATOMIC_RELAXED); n++) {
		mine[n % (1 << 20)] = (unsigned char)n;
		CHECK(mine[n % (1 << 20)] == (unsigned char)n);
		if (n % 1000 == 0)
			nap();
	}
	return argument;
}

int main(int argc, char **argv)
{
	CHECK(argc > 3);
	size_t pages = strtoul(argv[2], NULL, 10) * 256, rate = strtoul(argv[3], NULL, 10), room = 1024, used = 0;
	int churns = 0, forks = 0, threads = 0;
	for (int i = 4; i < argc; i++) {
		churns |= !strcmp(argv[i], "churn");
		forks |= !strcmp(argv[i], "forks");
		threads |= !strcmp(argv[i], "threads");
	}
	unsigned char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t *version = calloc(pages, sizeof *version);
	struct entry *log = malloc(room * sizeof *log);
	CHECK(memory != MAP_FAILED && version && log);
	for (size_t i = 0; i < pages; i++)
		fill(memory + i * PAGE, version[i] = next_version++);
	for (int i = 0; i < BLOCKS; i++)
		map_block(&blocks[i], NULL);
	pthread_t others[4];
	for (int i = 0; threads && i < 4; i++)
		CHECK(!pthread_create(&others[i], NULL, idle, NULL));
	ready(argc, argv);
	uint64_t sum = 0;
	for (int turn = 0; turn % 16 || !told_to_end(); turn++) {
		struct timespec pause = {0, 1000000};
		nanosleep(&pause, NULL);
		for (size_t i = 0; i < rate; i++) {
			size_t page = chance(pages);
			check(memory + page * PAGE, version[page]);
			fill(memory + page * PAGE, version[page] = next_version++);
			if (used == room)
				CHECK((log = realloc(log, (room += 4096) * sizeof *log)));
			log[used] = (struct entry){used, page, version[page], 0};
			sum = log[used].sum = mix(sum, &log[used]);
			used++;
		}
		if (churns)
			churn(forks);
	}
	__atomic_store_n(&over, 1, __ATOMIC_RELAXED);
	for (int i = 0; threads && i < 4; i++)
		CHECK(!pthread_join(others[i], NULL));
	for (size_t i = 0; i < pages; i++)
		check(memory + i * PAGE, version[i]);
	for (int i = 0; i < BLOCKS; i++)
		check_block(&blocks[i]);
	sum = 0;
	for (size_t i = 0; i < used; i++) {
		CHECK(log[i].number == i);
		sum = mix(sum, &log[i]);
		CHECK(log[i].sum == sum);
	}
	return 0;
}
