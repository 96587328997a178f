"""PAGEMAP_SCAN (<linux/fs.h>, Linux 6.7) with the 64-bit entries of /proc/PID/pagemap as the older way."""

import ctypes
import errno
import fcntl
import os
from typing import Final

PAGE: Final = 4096
_PAGEMAP_SCAN: Final = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg of 96 bytes)
_FILE: Final = 4
_PRESENT: Final = 8
_SWAPPED: Final = 16
_PFNZERO: Final = 32
_REGIONS: Final = 1024


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


def private_runs(pagemap: int, start: int, end: int) -> list[tuple[int, int]]:
    """(address, length) of the runs of pages that hold the process's own data: present or swapped, not of a file, not
    the zero page.

    Args:
        pagemap: descriptor of `/proc/PID/pagemap`.
    """
    try:
        return _scan(pagemap, start, end, _FILE | _PFNZERO, _PRESENT | _SWAPPED)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        return _read_entries(pagemap, start, end, True)


def present_runs(pagemap: int, start: int, end: int) -> list[tuple[int, int]]:
    """The same for shared memory: every present or swapped page but the zero page."""
    try:
        return _scan(pagemap, start, end, _PFNZERO, _PRESENT | _SWAPPED)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        return _read_entries(pagemap, start, end, False)


def _scan(pagemap: int, start: int, end: int, without: int, anyof: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    argument = _Argument(96, 0, start, end, 0, ctypes.addressof(_vector), _REGIONS, 0, without, without, anyof, anyof)
    address = ctypes.addressof(argument)
    while argument.start < end:
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, _at(address))
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


def _read_entries(pagemap: int, start: int, end: int, private: bool) -> list[tuple[int, int]]:
    # Bit 63 present, 62 swapped, 61 file page or shared anonymous (Documentation/admin-guide/mm/pagemap.rst).
    runs: list[tuple[int, int]] = []
    position = start
    while position < end:
        want = min((end - position) // PAGE, 65536) * 8
        raw = os.pread(pagemap, want, position // PAGE * 8)
        if not raw:
            break
        for entry in memoryview(raw).cast("Q"):
            if entry >> 62 and not (private and entry >> 61 & 1):
                if runs and runs[-1][0] + runs[-1][1] == position:
                    runs[-1] = (runs[-1][0], runs[-1][1] + PAGE)
                else:
                    runs.append((position, PAGE))
            position += PAGE
    return runs
