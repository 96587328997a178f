/* Checks: heap, brk growth, mmap, file maps (shared, private), guard pages, protections, advice, stack growth, shared anonymous memory. */
#include "victim.h"
#include <fcntl.h>
#include <setjmp.h>

static sigjmp_buf back;
static void on_fault(int signal) { siglongjmp(back, signal); }

static int faults(volatile char *address, int write)
{
	if (sigsetjmp(back, 1))
		return 1;
	if (write)
		*address = 1;
	else
		(void)*address;
	return 0;
}

static int deep(int depth)
{
	volatile char frame[8192];
	memset((void *)frame, depth, sizeof frame);
	int below = depth ? deep(depth - 1) : 0;
	return below + frame[17];
}

static int data[4096] = {1, 2, 3};

/* What the kernel says about the mapping at an address. */
static void flags_of(void *address, char *flags)
{
	FILE *file = fopen("/proc/self/smaps", "r");
	char line[512];
	unsigned long first, last;
	int inside = 0;
	CHECK(file);
	while (fgets(line, sizeof line, file)) {
		if (sscanf(line, "%lx-%lx ", &first, &last) == 2)
			inside = first <= (unsigned long)address && (unsigned long)address < last;
		else if (inside && !strncmp(line, "VmFlags:", 8)) {
			snprintf(flags, 256, "%.255s", line + 8);
			break;
		}
	}
	fclose(file);
}

int main(int argc, char **argv)
{
	signal(SIGSEGV, on_fault);
	unsigned char *heap = malloc(300000), *map = mmap(0, 1 << 20, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *none = mmap(0, 8192, 0, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *hidden = mmap(0, 8192, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	strcpy(hidden, "hidden");
	mprotect(hidden, 8192, PROT_NONE);
	char *readonly = mmap(0, 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	strcpy(readonly, "read only");
	mprotect(readonly, 4096, PROT_READ);
	char *shared = mmap(0, 65536, 3, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	strcpy(shared + 40000, "shared");
	int self = open("/proc/self/exe", O_RDONLY);
	unsigned char *private = mmap(0, 8192, 3, MAP_PRIVATE, self, 0);
	close(self);
	private[5000] = 0xee;
	char name[4096];
	snprintf(name, sizeof name, "%s.map", argv[1]);
	int file = open(name, O_RDWR | O_CREAT, 0600);
	CHECK(!ftruncate(file, 8192));
	char *filemap = mmap(0, 8192, 3, MAP_SHARED, file, 0);
	close(file);
	strcpy(filemap, "before");
	char *advised = mmap(0, 1 << 16, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	static const int advices[] = {MADV_DONTFORK, MADV_DONTDUMP, MADV_WIPEONFORK, MADV_NOHUGEPAGE, MADV_HUGEPAGE, MADV_RANDOM};
	char flags[6][256];
	for (int i = 0; i < 6; i++) /* each an area of its own; the kernel may lack huge pages */
		(void)!madvise(advised + 8192 * i, 4096, advices[i]), flags_of(advised + 8192 * i, flags[i]);
	CHECK(strstr(flags[0], " dc") && strstr(flags[1], " dd") && strstr(flags[2], " wf") && strstr(flags[5], " rr"));
	char *fourth = mmap(0, 4 * 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	fourth[0] = 1, fourth[3 * 4096] = 4; /* holes between */
	for (int i = 0; i < 300000; i++)
		heap[i] = (unsigned char)(i * 7);
	for (int i = 0; i < 1 << 20; i++)
		map[i] = (unsigned char)(i * 11 >> 3);
	data[9] = 99;
	char *top = sbrk(0);
	ready(argc, argv);
	while (!told_to_end())
		nap();
	for (int i = 0; i < 300000; i++)
		CHECK(heap[i] == (unsigned char)(i * 7));
	for (int i = 0; i < 1 << 20; i++)
		CHECK(map[i] == (unsigned char)(i * 11 >> 3));
	CHECK(data[0] == 1 && data[9] == 99 && data[4095] == 0);
	CHECK(!strcmp(shared + 40000, "shared") && private[5000] == 0xee && private[1] == 'E');
	CHECK(fourth[0] == 1 && fourth[4096] == 0 && fourth[3 * 4096] == 4);
	CHECK(faults(none, 0) && faults(hidden, 0) && faults(readonly, 1) && !faults(readonly, 0));
	mprotect(hidden, 8192, PROT_READ);
	for (int i = 0; i < 6; i++) {
		char now_flags[256];
		flags_of(advised + 8192 * i, now_flags);
		CHECK(!strcmp(flags[i], now_flags));
	}
	CHECK(!strcmp(hidden, "hidden") && !strcmp(readonly, "read only"));
	CHECK(sbrk(0) == top && sbrk(1 << 20) == top);
	top[1 << 19] = 1;
	CHECK(deep(200) == deep(200)); /* 1.6 MB of stack */
	strcpy(filemap, "after");
	CHECK(!msync(filemap, 8192, MS_SYNC));
	char got[8] = "";
	file = open(name, O_RDONLY);
	CHECK(read(file, got, 6) == 6 && !strcmp(got, "after"));
	void *more = malloc(5 << 20);
	CHECK(more);
	memset(more, 1, 5 << 20);
	if (!fork()) {
		CHECK(faults(advised, 0));
		_exit(0);
	}
	return 0;
}
