"""tee(2): copy what a pipe holds without taking it out."""

import ctypes
import os
from typing import Final

from engine.linux.libc import LIBC

SPLICE_F_NONBLOCK: Final = 2
_tee = LIBC.tee
_tee.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint]
_tee.restype = ctypes.c_ssize_t


def tee(source: int, target: int, length: int) -> int:
    """Duplicate up to `length` bytes from one pipe into another; returns how many. Raises OSError (EAGAIN: empty)."""
    count = _tee(source, target, length, SPLICE_F_NONBLOCK)
    if count < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "tee")
    return int(count)
