"""PAGEMAP_SCAN (<linux/fs.h>, Linux 6.7) with the 64-bit entries of /proc/PID/pagemap as the older way."""

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from functools import cache
from typing import Final

PAGE: Final = 4096
_PAGEMAP_SCAN: Final = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg of 96 bytes)
_WRITTEN: Final = 2
_FILE: Final = 4
_PRESENT: Final = 8
_SWAPPED: Final = 16
_PFNZERO: Final = 32
_WP_MATCHING: Final = 1  # flag: protect what matches, in the same step
_REGIONS: Final = 1024
_MOST_GAPS: Final = 1000  # that are looked at one by one, 5 us each
# Documentation/admin-guide/mm/pagemap.rst: bit 63 present, 62 swapped, 61 file page or shared anonymous
_NOT_FILE: Final = 7 << 61
_WANTED: Final = (1 << 63, 1 << 62)  # present or swapped
_SOFT_DIRTY: Final = 1 << 55
_PFN: Final = (1 << 55) - 1
_PIECE: Final = 65536 * PAGE  # bytes of address space in one read


class _Argument(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in [
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "inverted",
            "mask",
            "anyof",
            "return_mask",
        ]
    ]


_vector = (ctypes.c_uint64 * (3 * _REGIONS))()


class NoScan(OSError):
    """This kernel has no PAGEMAP_SCAN."""


def private_runs(pagemap: int, start: int, end: int) -> list[tuple[int, int]]:
    """(address, length) of the runs of pages that hold the process's own data: present or swapped, not of a file, not
    the zero page.

    Args:
        pagemap: descriptor of `/proc/PID/pagemap`.

    Raises:
        NoScan: use `private_entries`.
    """
    return _scan(pagemap, start, end)


def take_written(pagemap: int, start: int, end: int) -> list[tuple[int, int]]:
    """The runs that were written since they were last taken, which counts from now on; in one step a page.

    Only of mappings whose writes are recorded (`engine.linux.userfaultfd`). Raises as `private_runs`.
    """
    return _scan(pagemap, start, end, required=_WRITTEN, flags=_WP_MATCHING)


def marked_runs(pagemap: int, start: int, end: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """As `private_runs`, in two lists: written since they were last taken, and not. Raises likewise.

    Whether a page is of a file the kernel sees only in what describes the page itself: 60 ns each, most of it waiting
    for memory. What has the mark is of none, so that it is found without, 5 ns a page; the rest is looked at apart.
    """
    clean = _scan(pagemap, start, end, absent=_WRITTEN | _PFNZERO)
    if len(clean) > _MOST_GAPS:
        return _scan(pagemap, start, end, required=_WRITTEN), clean
    edges = [start, *(edge for address, length in clean for edge in (address, address + length)), end]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return [run for first, last in gaps if first < last for run in private_runs(pagemap, first, last)], clean


def _scan(
    pagemap: int, start: int, end: int, required: int = 0, absent: int = _FILE | _PFNZERO, flags: int = 0
) -> list[tuple[int, int]]:
    """(address, length) of pages in all the categories `required` and in none of `absent`, in memory or in swap."""
    runs: list[tuple[int, int]] = []
    argument = _Argument(
        96, flags, start, end, 0, ctypes.addressof(_vector), _REGIONS, 0, absent, absent | required,
        _PRESENT | _SWAPPED, 0,
    )  # fmt: skip
    address = ctypes.addressof(argument)
    while argument.start < end:
        try:
            count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, _at(address))
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                raise NoScan(error.errno, "no PAGEMAP_SCAN") from None
            raise
        for i in range(count):
            first, last = _vector[3 * i], _vector[3 * i + 1]
            if runs and runs[-1][0] + runs[-1][1] == first:
                runs[-1] = (runs[-1][0], last - runs[-1][0])
            else:
                runs.append((first, last - first))
        if argument.walk_end <= argument.start:
            break
        argument.start = argument.walk_end
    return runs


def _at(address: int) -> ctypes.Array[ctypes.c_char]:
    # fcntl.ioctl wants a writable buffer: a view of the very structure, so that the kernel's walk_end comes back.
    return (ctypes.c_char * 96).from_address(address)


@cache
def _zero_page() -> int:
    """The entry of the page that all untouched memory reads from; needs CAP_SYS_ADMIN, else no page is it."""
    memory = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert memory[0] == 0
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        entry = int.from_bytes(os.pread(file.fileno(), 8, address // PAGE * 8), "little")
    return entry & _PFN or -1


def private_entries(pagemap: int, start: int, end: int) -> list[tuple[int, int]]:
    """As `private_runs`, by reading 8 bytes a page of the address space: for spans that have pages."""
    runs: list[tuple[int, int]] = []
    for address, _ in _entries(pagemap, start, end):
        _append(runs, address)
    return runs


def soft_dirty_entries(pagemap: int, start: int, end: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """As `private_entries`, in two lists: written since /proc/PID/clear_refs was told 4, and not.

    Documentation/admin-guide/mm/soft-dirty.rst; a kernel without it has nothing in the first.
    """
    written: list[tuple[int, int]] = []
    clean: list[tuple[int, int]] = []
    for address, entry in _entries(pagemap, start, end):
        _append(written if entry & _SOFT_DIRTY else clean, address)
    return written, clean


@cache
def has_soft_dirty() -> bool:
    """Whether this kernel marks pages that are written."""
    memory = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memory[0] = 1
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        return soft_dirty_entries(file.fileno(), address, address + PAGE) == ([(address, PAGE)], [])


def _append(runs: list[tuple[int, int]], address: int) -> None:
    if runs and runs[-1][0] + runs[-1][1] == address:
        runs[-1] = (runs[-1][0], runs[-1][1] + PAGE)
    else:
        runs.append((address, PAGE))


def _entries(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    zero = _zero_page()
    for position in range(start, end, _PIECE):
        raw = os.pread(pagemap, min(end - position, _PIECE) // PAGE * 8, position // PAGE * 8)
        if raw.count(0) == len(raw):
            continue
        for index, entry in enumerate(memoryview(raw).cast("Q")):
            if entry & _NOT_FILE in _WANTED and not (entry & _PFN == zero and entry >> 63):
                yield position + index * PAGE, entry
