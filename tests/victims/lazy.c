/* Calls functions for the first time after the move, with sentinels around every frame: late binding must keep to its buffer. */
#include "victim.h"
#include <ctype.h>
#include <math.h>
#include <search.h>
#include <wchar.h>

static int order(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

static __attribute__((noinline)) void call(void)
{
	volatile uint64_t guard[512]; /* 4 KB: more than any buffer that is too small by AVX-512 */
	int numbers[] = {3, 1, 2};
	for (int i = 0; i < 512; i++)
		guard[i] = 0x5a5a5a5a00000000u + (uint64_t)i;
	qsort(numbers, 3, sizeof *numbers, order);
	CHECK(numbers[0] == 1 && numbers[2] == 3);
	CHECK(strtol("77", NULL, 10) == 77 && toupper('a') == 'A' && wcslen(L"four") == 4);
	CHECK(lfind(&numbers[1], numbers, &(size_t){3}, sizeof *numbers, order) == &numbers[1]);
	CHECK(fabs(cbrt(27.0) - 3) < 1e-9 && fabs(strtod("2.5", NULL) - 2.5) < 1e-9);
	for (int i = 0; i < 512; i++)
		CHECK(guard[i] == 0x5a5a5a5a00000000u + (uint64_t)i);
}

int main(int argc, char **argv)
{
	nap(); /* what comes before the move is bound by then: the test changes the buffer's size */
	stop_file = argv[1];
	CHECK(!told_to_end());
	ready(argc, argv);
	while (!told_to_end())
		nap();
	call();
	return 0;
}
