/* What is peculiar to x86-64 in programs without a C library: a system call, and where a program begins.
 *
 * engine/linux/x86_64.py is the other half; runner.S is all assembler.
 */
#ifndef X86_64_H
#define X86_64_H

static long call6(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;
	__asm__ volatile("syscall"
	                 : "=a"(result)
	                 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
	                 : "rcx", "r11", "memory");
	return result;
}

/* The function that a program begins in; it gets the stack as the kernel has left it, and does not return. */
#define ENTRY(function) \
	__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall " #function "\n");

#endif
