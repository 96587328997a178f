"""What is peculiar to x86-64: system-call numbers, registers, and the few instructions that the engine writes.

Another processor needs this file again, and its own engine/cpu.py and engine/linux/cpuid.py (which instructions a
process may use), engine/binder.py (late binding), engine/csrc/runner.S and engine/csrc/x86_64.h.
"""

import ctypes
import struct
from typing import Final

# <asm/unistd_64.h>
NR: Final = {
    "read": 0, "write": 1, "open": 2, "close": 3, "poll": 7, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "ioctl": 16, "select": 23, "mremap": 25, "msync": 26, "madvise": 28,
    "dup2": 33, "nanosleep": 35, "getitimer": 36, "setitimer": 38, "getpid": 39, "accept": 43, "recvfrom": 45,
    "sendmsg": 46, "recvmsg": 47, "socketpair": 53, "execve": 59, "exit": 60, "semop": 65, "msgsnd": 69, "msgrcv": 70,
    "fcntl": 72, "chdir": 80, "fchdir": 81, "umask": 95, "gettimeofday": 96, "ptrace": 101, "setuid": 105,
    "setpgid": 109, "setsid": 112, "setgroups": 116, "setresuid": 117, "setresgid": 119, "setfsuid": 122,
    "setfsgid": 123, "capset": 126, "rt_sigtimedwait": 128, "rt_sigqueueinfo": 129, "sigaltstack": 131,
    "personality": 135, "statfs": 137, "mlockall": 151, "prctl": 157, "arch_prctl": 158, "gettid": 186, "time": 201,
    "futex": 202, "sched_setaffinity": 203, "io_getevents": 208, "set_tid_address": 218, "restart_syscall": 219,
    "semtimedop": 220, "timer_create": 222, "timer_settime": 223, "timer_gettime": 224, "timer_getoverrun": 225,
    "timer_delete": 226, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231,
    "epoll_wait": 232, "tgkill": 234, "ioprio_set": 251, "ioprio_get": 252, "pselect6": 270, "ppoll": 271,
    "set_robust_list": 273, "get_robust_list": 274, "epoll_pwait": 281, "accept4": 288, "dup3": 292,
    "rt_tgsigqueueinfo": 297, "recvmmsg": 299, "prlimit64": 302, "getcpu": 309, "process_vm_readv": 310,
    "process_vm_writev": 311, "kcmp": 312, "sched_setattr": 314, "sched_getattr": 315, "getrandom": 318,
    "execveat": 322,
    "userfaultfd": 323, "membarrier": 324, "mlock2": 325, "io_pgetevents": 333, "rseq": 334, "pidfd_send_signal": 424,
    "pidfd_open": 434, "clone3": 435, "close_range": 436, "pidfd_getfd": 438, "epoll_pwait2": 441, "mseal": 462,
}  # fmt: skip

_ALL: Final = 0xFFFFFFFFFFFFFFFF
_USER_CS: Final = 0x33  # of 64-bit code, __USER_CS of <asm/segment.h>
_SYSCALL: Final = b"\x0f\x05"

NOTE_EXTENDED: Final = 0x202  # NT_X86_XSTATE of <linux/elf.h>: the XSAVE area
EXTENDED_MAX: Final = 16384  # bytes; AVX-512 + AMX tiles need 11008

# Interrupted system calls, include/linux/errno.h
ERESTARTSYS: Final = -512
ERESTARTNOINTR: Final = -513
ERESTARTNOHAND: Final = -514
ERESTART_RESTARTBLOCK: Final = -516

# struct user_regs_struct, in the kernel's order (<sys/user.h>)
_REGISTERS: Final = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "orig_rax",
    "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)  # fmt: skip
_ARGUMENTS: Final = ("rdi", "rsi", "rdx", "r10", "r8", "r9")


def signed(value: int) -> int:
    """The signed reading of a 64-bit register."""
    return value - (1 << 64) if value >> 63 else value


class Registers(ctypes.Structure):
    """General registers of a thread. Others than this file and engine/runner.py go by the properties."""

    _fields_ = [(name, ctypes.c_ulong) for name in _REGISTERS]

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int

    def copy(self) -> "Registers":
        """An independent copy."""
        return Registers.from_buffer_copy(self)

    @property
    def pc(self) -> int:
        """Address of the next instruction."""
        return self.rip

    @pc.setter
    def pc(self, address: int) -> None:
        self.rip = address

    @property
    def stack(self) -> int:
        """The stack pointer."""
        return self.rsp

    @property
    def thread_area(self) -> int:
        """Where the C library keeps what is the thread's own."""
        return self.fs_base

    @property
    def is_native(self) -> bool:
        """Whether it runs 64-bit code."""
        return self.cs == _USER_CS

    @property
    def call(self) -> int:
        """The system call that it has been stopped in; below 0: none."""
        return signed(self.orig_rax)

    @call.setter
    def call(self, number: int) -> None:
        self.orig_rax = number & _ALL

    @property
    def result(self) -> int:
        """What that call returns: -errno where it failed, and what the kernel says to itself of interrupted ones."""
        return signed(self.rax)

    @result.setter
    def result(self, value: int) -> None:
        self.rax = value & _ALL

    def argument(self, index: int) -> int:
        """One of the six arguments of a call."""
        value: int = getattr(self, _ARGUMENTS[index])
        return value

    def set_argument(self, index: int, value: int) -> None:
        """Give it another."""
        setattr(self, _ARGUMENTS[index], value & _ALL)

    def set_call(self, number: int, arguments: tuple[int, ...]) -> None:
        """What a system-call instruction finds."""
        self.rax = number
        for index in range(len(_ARGUMENTS)):
            self.set_argument(index, arguments[index] if index < len(arguments) else 0)

    def run_table(self, row: int, count: int, slot: int) -> None:
        """What csrc/runner.S wants to find."""
        self.rbx, self.r12, self.rbp = row, count, slot

    @property
    def gate_result(self) -> int:
        """At the stop of a gate with a trap."""
        return signed(self.rbx)

    def repeat(self, number: int) -> None:
        """Have it make the call again that it has just come out of, or another one in its place."""
        self.rax, self.rip, self.orig_rax = number, self.rip - len(_SYSCALL), _ALL


def restarted(registers: Registers) -> Registers:
    """Registers with which a thread that is in *user mode* repeats the system call that it was interrupted in.

    The kernel does the same on its own way back to user mode (arch/x86/kernel/signal.c); this is for code that has to
    do without it.
    """
    result = registers.copy()
    if registers.call >= 0:
        if registers.result in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND):
            result.repeat(registers.orig_rax)
        elif registers.result == ERESTART_RESTARTBLOCK:
            result.repeat(NR["restart_syscall"])
    result.orig_rax = _ALL
    return result


def gate_code(address: int, registers: Registers, mask: int, trap: int) -> bytes:
    """The gate of engine/runner.py, to be at an address; with `trap` its result is in rbx at the stop."""
    # syscall; with a trap, its result to rbx and tgkill(getpid(), gettid(), trap); rt_sigprocmask(SIG_SETMASK, mask);
    # every register that has another value now; jmp. Moves leave the flags alone.
    stop = (
        b"\x48\x89\xc3"
        + b"\xb8\x27\0\0\0\x0f\x05\x89\xc7"
        + b"\xb8\xba\0\0\0\x0f\x05\x89\xc6"
        + b"\xba"
        + struct.pack("<I", trap)
        + b"\xb8\xea\0\0\0\x0f\x05"
        if trap
        else b""
    )
    head = (
        _SYSCALL
        + stop
        + b"\xbf\x02\0\0\0"
        + b"\x48\xbe%b"
        + b"\xba\0\0\0\0"
        + b"\x41\xba\x08\0\0\0"
        + b"\xb8\x0e\0\0\0"
        + b"\x0f\x05"
    )
    back = restarted(registers)
    moves = b"".join(
        opcode + struct.pack("<Q", value)
        for opcode, value in (
            (b"\x48\xb8", back.rax), (b"\x48\xbb", back.rbx), (b"\x48\xb9", back.rcx), (b"\x48\xba", back.rdx),
            (b"\x48\xbe", back.rsi), (b"\x48\xbf", back.rdi),
            (b"\x49\xb8", back.r8), (b"\x49\xb9", back.r9), (b"\x49\xba", back.r10), (b"\x49\xbb", back.r11),
        )
    )  # fmt: skip
    size = len(head) - 2 + 8 + len(moves) + 14
    body = head % struct.pack("<Q", address + size) + moves + b"\xff\x25\0\0\0\0" + struct.pack("<Q", back.rip)
    return body + struct.pack("<Q", mask)


def slot(registers: Registers, mask: int, trap: int, at: int, heal: int, heal_count: int) -> bytes:
    """A thread's slot of csrc/runner.S, to be at an address."""
    r = restarted(registers)
    stub = b"\x48\xbd" + struct.pack("<Q", r.rbp) + b"\xff\x25\0\0\0\0" + struct.pack("<Q", r.rip)
    return (
        struct.pack(
            "<21Q", heal, heal_count, trap, at + 168, mask, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.r8, r.r9,
            r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15, r.rsp, r.eflags,
        ) + stub
    )  # fmt: skip


_JUMP_OP: Final = b"\xff\x25"  # jmp *rel32(%rip)
JUMP: Final = 6  # bytes


def jump_by(slot_at: int, at: int) -> bytes:
    """A jump, to be at `at`, to the address that is at `slot_at`."""
    return _JUMP_OP + struct.pack("<i", slot_at - at - JUMP)


def call_and_return(number: int) -> bytes:
    """A function that is nothing but a system call: 8 bytes."""
    return b"\xb8" + struct.pack("<I", number) + _SYSCALL + b"\xc3"


CONTEXT_WORDS: Final = 3


def is_context(words: memoryview, index: int) -> bool:
    """Whether a signal handler's return address is at words[index]: struct sigcontext has rip, eflags, then cs.

    The selector tells a context from other words (<asm/sigcontext.h>).
    """
    selector: int = words[index + 2]
    return selector & 0xFFFF == _USER_CS
