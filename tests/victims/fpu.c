/* Checks: x87 control word, MXCSR, and every SSE, AVX and AVX-512 register, without a system call in between. */
#include "victim.h"
#include <fenv.h>
#include <immintrin.h>

static int wide;
static unsigned char pattern[32][64], seen[32][64];

#define LOAD(n) __asm__ volatile("vmovdqu64 %0, %%zmm" #n : : "m"(pattern[n]) : );
#define SAVE(n) __asm__ volatile("vmovdqu64 %%zmm" #n ", %0" : "=m"(seen[n]));
#define LOADY(n) __asm__ volatile("vmovdqu %0, %%ymm" #n : : "m"(pattern[n]));
#define SAVEY(n) __asm__ volatile("vmovdqu %%ymm" #n ", %0" : "=m"(seen[n]));
#define EACH16(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15)
#define EACH32(M) EACH16(M) M(16) M(17) M(18) M(19) M(20) M(21) M(22) M(23) M(24) M(25) M(26) M(27) M(28) M(29) M(30) M(31)

/* Spins in user mode with the registers loaded until *flag changes. */
static __attribute__((noinline)) void spin(volatile int *flag, uint64_t *mask)
{
	if (wide) {
		EACH32(LOAD)
		__asm__ volatile("kmovq %0, %%k3" : : "r"(*mask));
		while (!*flag)
			__asm__ volatile("pause");
		EACH32(SAVE)
		__asm__ volatile("kmovq %%k3, %0" : "=r"(*mask));
	} else {
		EACH16(LOADY)
		while (!*flag)
			__asm__ volatile("pause");
		EACH16(SAVEY)
	}
}

static volatile int *flag;
static void on_term(int signal) { (void)signal, *flag = 1; }

int main(int argc, char **argv)
{
	wide = __builtin_cpu_supports("avx512bw");
	CHECK(__builtin_cpu_supports("avx2"));
	flag = calloc(1, 4);
	for (int i = 0; i < 32; i++)
		for (int j = 0; j < 64; j++)
			pattern[i][j] = (unsigned char)(i * 64 + j * 3 + 1);
	signal(SIGUSR1, on_term);
	fesetround(FE_UPWARD);
	unsigned control = _mm_getcsr() | 0x8000;
	_mm_setcsr(control);
	long double big = 1.0L;
	for (int i = 2; i < 20; i++)
		big *= i + 0.1L;
	uint64_t mask = 0x123456789abcdef0;
	ready(argc, argv);
	spin(flag, &mask);
	size_t width = wide ? 64 : 32;
	for (int i = 0; i < (wide ? 32 : 16); i++)
		CHECK(!memcmp(pattern[i], seen[i], width));
	CHECK(mask == 0x123456789abcdef0);
	CHECK(fegetround() == FE_UPWARD && _mm_getcsr() == control);
	long double again = 1.0L;
	for (int i = 2; i < 20; i++)
		again *= i + 0.1L;
	CHECK(big == again);
	return 0;
}
