/* Checks: shared memory without a name: memfds with and without a descriptor, mapped twice, read-only, partly; deleted files; what
 * only a dead parent has touched; flags, locks and reservations of mappings. */
#include "victim.h"
#include <fcntl.h>
#include <sys/wait.h>

#define PAGE 4096

static unsigned char *map(size_t size, int prot, int flags, int fd, off_t offset)
{
	unsigned char *at = mmap(0, size, prot, flags, fd, offset);
	CHECK(at != MAP_FAILED);
	return at;
}

static void fill(unsigned char *at, size_t size, int seed)
{
	for (size_t i = 0; i < size; i++)
		at[i] = (unsigned char)(i * 7 + i / 4096 + seed);
}

static int holds(unsigned char *at, size_t size, int seed)
{
	for (size_t i = 0; i < size; i++)
		if (at[i] != (unsigned char)(i * 7 + i / 4096 + seed))
			return 0;
	return 1;
}

static int flag_set(void *address, const char *flag)
{
	char line[512];
	int here = 0, found = -1;
	FILE *file = fopen("/proc/self/smaps", "r");
	CHECK(file);
	while (fgets(line, sizeof line, file)) {
		unsigned long first, last;
		if (sscanf(line, "%lx-%lx ", &first, &last) == 2)
			here = first <= (unsigned long)address && (unsigned long)address < last;
		else if (here && !strncmp(line, "VmFlags:", 8))
			found = strstr(line, flag) != NULL;
	}
	fclose(file);
	return found;
}

int main(int argc, char **argv)
{
	size_t size = 64 * PAGE, terabyte = 1UL << 40;
	/* A parent that writes and ends: our page tables know nothing of its pages. */
	unsigned char *legacy = map(size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int kept = memfd_create("kept", MFD_CLOEXEC), gone = memfd_create("gone", MFD_CLOEXEC);
	CHECK(kept >= 0 && gone >= 0 && !ftruncate(kept, size) && !ftruncate(gone, 2 * size));
	unsigned char *rw = map(size, PROT_READ | PROT_WRITE, MAP_SHARED, kept, 0);
	unsigned char *ro = map(size, PROT_READ, MAP_SHARED, kept, 0);
	unsigned char *twice = map(size, PROT_READ | PROT_WRITE, MAP_SHARED, gone, size);
	unsigned char *alias = map(size, PROT_READ, MAP_SHARED, gone, size);
	unsigned char *part = map(4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gone, 2 * PAGE);
	unsigned char *copy = map(size, PROT_READ | PROT_WRITE, MAP_PRIVATE, gone, 0);
	fill(rw, size, 1), fill(twice, size, 2), fill(part, 4 * PAGE, 3);
	fill(copy, PAGE, 4);
	close(gone);
	char name[4096];
	snprintf(name, sizeof name, "%s.deleted", argv[1]);
	int file = open(name, O_RDWR | O_CREAT, 0600);
	CHECK(file >= 0 && !ftruncate(file, size));
	unsigned char *deleted = map(size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	fill(deleted, size, 5);
	CHECK(!unlink(name));
	unsigned char *frozen = map(size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	fill(frozen, size, 6);
	CHECK(!mprotect(frozen, size, PROT_READ));
	unsigned char *reserved = map(2 * terabyte, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	unsigned char *sparse = map(terabyte, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	sparse[0] = 1, sparse[terabyte / 3] = 2, sparse[terabyte - 1] = 3;
	unsigned char *wiped = map(PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned char *small = map(8 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned char *huge = map(8 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned char *locked = map(PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned char *down = map(4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN, -1, 0);
	fill(wiped, PAGE, 7), fill(down, 4 * PAGE, 9), fill(huge, 8 << 20, 10);
	CHECK(!madvise(wiped, PAGE, MADV_WIPEONFORK) && !madvise(small, 8 << 20, MADV_NOHUGEPAGE));
	CHECK(!madvise(huge, 8 << 20, MADV_HUGEPAGE) && !mlock(locked, PAGE));
	if (argc > 2) { /* many mappings: neighbours differ, so that none can be merged */
		unsigned char *many = map(10000UL * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		for (int i = 0; i < 10000; i += 2) {
			many[i * (size_t)PAGE] = (unsigned char)i;
			CHECK(!mprotect(many + i * (size_t)PAGE, PAGE, PROT_READ));
		}
		ready(argc, argv);
		while (!told_to_end())
			nap();
		for (int i = 0; i < 10000; i += 2)
			CHECK(many[i * (size_t)PAGE] == (unsigned char)i && many[(i + 1) * (size_t)PAGE] == 0);
		return 0;
	}
	if (!fork()) {
		fill(legacy, size, 8);
		_exit(0);
	}
	CHECK(wait(NULL) > 0);
	ready(argc, argv);
	while (!told_to_end())
		nap();
	CHECK(holds(legacy, size, 8));
	CHECK(holds(rw, size, 1) && holds(ro, size, 1));
	CHECK(holds(twice, size, 2) && holds(alias, size, 2) && holds(part, 4 * PAGE, 3) && holds(copy, PAGE, 4));
	CHECK(copy[2 * PAGE] == part[0] && holds(deleted, size, 5) && holds(frozen, size, 6));
	fill(rw, size, 11), fill(twice, size, 12), fill(deleted, size, 13);
	CHECK(holds(ro, size, 11) && holds(alias, size, 12)); /* still one object */
	unsigned char got[PAGE];
	CHECK(pread(kept, got, PAGE, 0) == PAGE && holds(got, PAGE, 11));
	CHECK(pread(file, got, PAGE, 0) == PAGE && holds(got, PAGE, 13));
	CHECK(sparse[0] == 1 && sparse[terabyte / 3] == 2 && sparse[terabyte - 1] == 3 && sparse[terabyte / 2] == 0);
	CHECK(!mprotect(reserved + terabyte, PAGE, PROT_READ | PROT_WRITE) && !(reserved[terabyte] = 0));
	CHECK(holds(wiped, PAGE, 7) && holds(down, 4 * PAGE, 9) && holds(huge, 8 << 20, 10));
	CHECK(flag_set(wiped, " wf") == 1 && flag_set(small, " nh") == 1 && flag_set(huge, " hg") == 1);
	CHECK(flag_set(locked, " lo") == 1 && flag_set(down, " gd") == 1);
	pid_t child = fork();
	if (!child)
		_exit(!(wiped[0] == 0 && wiped[17] == 0 && holds(rw, size, 11)));
	int status;
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	return 0;
}
