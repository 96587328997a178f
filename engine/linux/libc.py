"""syscall(2): one checked entry for every system call that Python's os module lacks."""

import ctypes
import errno
import os

LIBC = ctypes.CDLL(None, use_errno=True)
_syscall = LIBC.syscall
_syscall.restype = ctypes.c_long


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


def is_error(value: int) -> bool:
    """Whether a raw system-call result (signed) is -errno."""
    return -4095 <= value < 0


def error_text(value: int) -> str:
    """`EPERM (Operation not permitted)` of a raw negative result."""
    return f"{errno.errorcode.get(-value, str(-value))} ({os.strerror(-value)})"
