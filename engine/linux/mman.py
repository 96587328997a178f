"""<sys/mman.h>, madvise(2)."""

import contextlib
from typing import Final

from engine.linux import procfs
from engine.linux.libc import syscall
from engine.linux.x86_64 import NR

_POPULATE_WRITE: Final = 23
_LARGEST: Final = 64 << 20  # bytes of a mapping: a larger one is no heap of ours
_WRITABLE: Final = 3  # PROT_READ | PROT_WRITE


def warm_up() -> None:
    """Have all memory that this process may write to be its own at once, and not fault by fault.

    What a fresh worker writes to during a move is some 1,800 pages: 25 ms on a virtual machine, and half of that in one
    go, at a time when nobody waits.
    """
    for vma in procfs.parse_maps(procfs.read("/proc/self/maps")):
        if not vma.shared and vma.prot == _WRITABLE and vma.end - vma.start <= _LARGEST and vma.path != "[stack]":
            with contextlib.suppress(OSError):  # EINVAL before Linux 5.14: then it comes fault by fault
                syscall(NR["madvise"], vma.start, vma.end - vma.start, _POPULATE_WRITE)
