"""syscall(2): one checked entry for every system call that Python's os module lacks."""

import ctypes
import errno
import os

LIBC = ctypes.CDLL(None, use_errno=True)
_syscall = LIBC.syscall
_syscall.restype = ctypes.c_long

# <asm/unistd_64.h>
NR = {
    "write": 1, "open": 2, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask":
    14, "ioctl": 16, "mremap": 25,
    "madvise": 28, "dup2": 33, "getitimer": 36, "setitimer": 38, "getpid": 39, "recvfrom": 45, "sendmsg": 46,
    "recvmsg": 47,
    "socketpair": 53, "execve": 59, "exit": 60, "fcntl": 72, "chdir": 80, "fchdir": 81, "umask": 95, "setuid": 105,
    "setpgid": 109,
    "setsid": 112, "setgroups": 116, "setresuid": 117, "setresgid": 119, "capset": 126, "rt_sigtimedwait": 128,
    "rt_sigqueueinfo": 129, "sigaltstack": 131, "personality": 135, "membarrier": 324,
    "mlock2": 325, "prctl": 157, "arch_prctl": 158,
    "gettid": 186, "msync": 26, "mlockall": 151,
    "setfsuid": 122, "setfsgid": 123, "futex": 202, "sched_setaffinity": 203, "set_tid_address": 218,
    "restart_syscall": 219,
    "timer_create": 222, "timer_settime": 223, "timer_gettime": 224, "timer_getoverrun": 225, "timer_delete": 226,
    "exit_group": 231, "tgkill": 234, "set_robust_list": 273, "get_robust_list": 274, "rt_tgsigqueueinfo": 297,
    "prlimit64": 302, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "sched_setattr": 314,
    "sched_getattr": 315,
    "execveat": 322, "userfaultfd": 323,
    "statfs": 137, "rseq": 334, "pidfd_send_signal": 424, "pidfd_open": 434, "clone3": 435, "close_range": 436,
    "pidfd_getfd": 438, "dup3": 292, "close": 3, "ptrace": 101, "ioprio_set": 251, "ioprio_get": 252,
}  # fmt: skip


def syscall(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None, subject: str = "") -> int:
    """Make one system call.

    Args:
        number: from `NR`.
        arguments: integers (signed or unsigned 64 bits), bytes or ctypes buffers.
        subject: what the call is about, for the error text.

    Raises:
        OSError: the call failed; carries errno, its text and the subject.
    """
    result: int = _syscall(ctypes.c_long(number), *[_argument(a) for a in arguments])
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), subject or None)
    return result


def _argument(value: int | bytes | ctypes.Array[ctypes.c_char] | None) -> object:
    if isinstance(value, int):
        return ctypes.c_ulong(value & 0xFFFFFFFFFFFFFFFF)
    if value is None:
        return ctypes.c_ulong(0)
    return value


def signed(value: int) -> int:
    """The signed reading of a 64-bit register."""
    return value - (1 << 64) if value >> 63 else value


def is_error(value: int) -> bool:
    """Whether a raw system-call result (signed) is -errno."""
    return -4095 <= value < 0


def error_text(value: int) -> str:
    """`EPERM (Operation not permitted)` of a raw negative result."""
    return f"{errno.errorcode.get(-value, str(-value))} ({os.strerror(-value)})"
