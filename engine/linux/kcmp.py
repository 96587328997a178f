"""kcmp(2): do two descriptors share one open file description, two processes one memory?"""

import ctypes
import os
from typing import Final

from engine.linux.libc import LIBC
from engine.linux.x86_64 import NR

_KCMP_FILE: Final = 0
VM: Final = 1  # of `same`
FILES: Final = 2
FS: Final = 3
_syscall = LIBC.syscall


def same_file(pid: int, first: int, second: int, other: int = 0) -> bool:
    """Whether two descriptor numbers of a process, or of it and an `other`, are one open file description. Raises
    OSError.
    """
    result = _syscall(NR["kcmp"], pid, other or pid, _KCMP_FILE, first, second)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"descriptors {first} and {second} of process {pid}")
    return bool(result == 0)


def same_memory(pid: int, other: int) -> bool:
    """Whether two processes run in one address space; no where one of them is gone. Raises nothing."""
    return bool(_syscall(NR["kcmp"], pid, other, VM, 0, 0) == 0)


def same(pid: int, other: int, what: int) -> bool:
    """Whether two processes have their VM, FILES or FS in common, by CLONE_VM and the like. Raises OSError."""
    result = _syscall(NR["kcmp"], pid, other, what, 0, 0)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"processes {pid} and {other}")
    return bool(result == 0)
