/* Checks: huge pages of hugetlb, private (also read-only, and reserved only) and shared, and mlockall for what comes later. */
#include "victim.h"
#include <sys/resource.h>

#define HUGE (2UL << 20)

static unsigned char *map(size_t pages, int flags)
{
	unsigned char *at = mmap(0, pages * HUGE, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS | MAP_HUGETLB | 21 << 26, -1, 0);
	if (at == MAP_FAILED) {
		fprintf(stderr, "SKIP: huge pages: %s\n", strerror(errno));
		exit(77);
	}
	return at;
}

static void fill(unsigned char *at, int seed)
{
	for (size_t i = 0; i < HUGE; i++)
		at[i] = (unsigned char)(i * 7 + i / 4096 + seed);
}

static int holds(unsigned char *at, int seed)
{
	for (size_t i = 0; i < HUGE; i++)
		if (at[i] != (unsigned char)(i * 7 + i / 4096 + seed))
			return 0;
	return 1;
}

/* A line of what smaps says about the mapping at an address. */
static void describe(void *address, const char *field, char *text)
{
	char line[512];
	int here = 0;
	FILE *file = fopen("/proc/self/smaps", "r");
	CHECK(file);
	*text = 0;
	while (fgets(line, sizeof line, file)) {
		unsigned long first, last;
		if (sscanf(line, "%lx-%lx ", &first, &last) == 2)
			here = first <= (unsigned long)address && (unsigned long)address < last;
		else if (here && !strncmp(line, field, strlen(field)))
			strcpy(text, line);
	}
	fclose(file);
}

static int has(void *address, const char *field, const char *what)
{
	char text[512];
	describe(address, field, text);
	return strstr(text, what) != NULL;
}

int main(int argc, char **argv)
{
	unsigned char *private = map(2, MAP_PRIVATE), *shared = map(1, MAP_SHARED), *fixed = map(1, MAP_PRIVATE);
	fill(private, 1), fill(shared, 2), fill(fixed, 3);
	CHECK(!mprotect(fixed, HUGE, PROT_READ));
	int locks = argc > 2 && !strcmp(argv[2], "onfault") ? MCL_FUTURE | MCL_ONFAULT : MCL_FUTURE;
	CHECK(!mlockall(locks));
	unsigned char *early = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(early != MAP_FAILED && has(early, "VmFlags:", " lo"));
	ready(argc, argv);
	while (!told_to_end())
		nap();
	CHECK(holds(private, 1) && holds(shared, 2) && holds(fixed, 3) && private[HUGE] == 0);
	CHECK(has(private, "KernelPageSize:", " 2048 kB") && has(shared, "KernelPageSize:", " 2048 kB"));
	CHECK(has(fixed, "KernelPageSize:", " 2048 kB") && !has(fixed, "VmFlags:", " wr") && has(shared, "VmFlags:", " sh"));
	unsigned char *late = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(late != MAP_FAILED && has(early, "VmFlags:", " lo") && has(late, "VmFlags:", " lo"));
	CHECK(has(late, "VmFlags:", " lf") == !!(locks & MCL_ONFAULT));
	return 0;
}
