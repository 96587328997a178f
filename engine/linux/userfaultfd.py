"""userfaultfd(2) as a record of writes: WP_ASYNC (<linux/userfaultfd.h>, Linux 6.7), read and reset by PAGEMAP_SCAN.

Nobody answers faults: the kernel lifts the protection of a page itself at the first write, and PAGEMAP_SCAN tells which
pages are still protected.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from functools import cache
from typing import Final

from engine.linux import pagemap
from engine.linux.libc import LIBC, NR, syscall

USER_MODE_ONLY: Final = 1  # needs no privilege; who only records writes loses nothing by it
FLAGS: Final = os.O_CLOEXEC | USER_MODE_ONLY
_API: Final = 0xC018AA3F  # _IOWR(0xAA, 0x3F, struct uffdio_api)
_REGISTER: Final = 0xC020AA00  # _IOWR(0xAA, 0x00, struct uffdio_register)
_VERSION: Final = 0xAA
_WP_ASYNC: Final = 1 << 15
_MODE_WP: Final = 2
_PAGE: Final = 4096
_MREMAP_MOVE_FIXED: Final = 3


def enable(fd: int) -> None:
    """Agree on WP_ASYNC. Raises OSError(EINVAL) where the kernel has none."""
    fcntl.ioctl(fd, _API, struct.pack("<3Q", _VERSION, _WP_ASYNC, 0))


def register(fd: int, start: int, end: int) -> None:
    """Record writes to the mappings in a span.

    Raises:
        OSError: EBUSY, they have another userfaultfd; ESRCH, the address space is gone; EINVAL, they cannot be watched.
    """
    fcntl.ioctl(fd, _REGISTER, struct.pack("<4Q", start, end - start, _MODE_WP, 0))


@cache
def works() -> bool:
    """Whether this kernel records writes, and a page that mremap moves counts as written (from Linux 6.13)."""
    try:
        fd = syscall(NR["userfaultfd"], FLAGS)
    except OSError:
        return False
    table = -1
    memory = mmap.mmap(-1, 4 * _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        memory[0] = 1
        enable(fd)
        register(fd, base, base + _PAGE)
        table = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        pagemap.take_written(table, base, base + _PAGE)
        if pagemap.marked_runs(table, base, base + _PAGE) != ([], [(base, _PAGE)]):
            return False
        LIBC.mremap.restype = ctypes.c_void_p
        moved = LIBC.mremap(
            ctypes.c_void_p(base), ctypes.c_size_t(_PAGE), ctypes.c_size_t(_PAGE), _MREMAP_MOVE_FIXED,
            ctypes.c_void_p(base + 2 * _PAGE),
        )  # fmt: skip
        return moved == base + 2 * _PAGE and pagemap.marked_runs(table, moved, moved + _PAGE)[1] == []
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTTY):
            return False
        raise
    finally:
        os.close(fd)
        if table >= 0:
            os.close(table)
