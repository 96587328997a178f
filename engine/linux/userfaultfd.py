"""userfaultfd(2), in two uses (<linux/userfaultfd.h>).

As a **record of writes**: WP_ASYNC (Linux 6.7), read and reset by PAGEMAP_SCAN. Nobody answers faults: the kernel lifts
the protection of a page itself at the first write, and PAGEMAP_SCAN tells which pages are still protected.

To **fill memory that is touched** before it is there: missing mode (Linux 4.11 with all its events). Whoever touches a
page waits until it is given one, in system calls as well; forks, unmappings, moves and discards of such memory wait
until the event that tells of them has been read.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass
from functools import cache
from typing import Final

from engine.linux import pagemap
from engine.linux.libc import LIBC, syscall
from engine.linux.x86_64 import NR

USER_MODE_ONLY: Final = 1  # needs no privilege; who only records writes loses nothing by it
FLAGS: Final = os.O_CLOEXEC | USER_MODE_ONLY
_API: Final = 0xC018AA3F  # _IOWR(0xAA, 0x3F, struct uffdio_api)
_REGISTER: Final = 0xC020AA00  # _IOWR(0xAA, 0x00, struct uffdio_register)
_VERSION: Final = 0xAA
_WP_ASYNC: Final = 1 << 15
_MODE_WP: Final = 2
_PAGE: Final = 4096
_MREMAP_MOVE_FIXED: Final = 3

ANSWERED: Final = os.O_CLOEXEC | os.O_NONBLOCK  # flags; poll(2) wants the second. Faults in system calls count, too
NEW: Final = 0xAA00  # USERFAULTFD_IOC_NEW, of DEVICE: one of the caller's memory, whatever its rights (Linux 6.1)
DEVICE: Final = "/dev/userfaultfd"
_MODE_MISSING: Final = 1
_EVENTS: Final = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6  # UFFD_FEATURE_EVENT_FORK, _REMAP, _REMOVE, _UNMAP
_COPY: Final = 0xC028AA03
_ZEROPAGE: Final = 0xC020AA04
_WAKE: Final = 0x8010AA02
_MESSAGE: Final = struct.Struct("<B7xQQQ")  # struct uffd_msg: its event, and three words that depend on that
_AT_ONCE: Final = 64


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


# ---- filling what is missing -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """Somebody waits for a page."""

    address: int


@dataclass(frozen=True, slots=True)
class Fork:
    """A child has the same memory, with a descriptor of its own, which is the reader's. It runs from now on."""

    fd: int


@dataclass(frozen=True, slots=True)
class Moved:
    """mremap(2) has moved pages."""

    start: int
    to: int
    length: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """Memory has been unmapped, or its content given up: it is zero when it is touched."""

    start: int
    end: int


Event = Fault | Fork | Moved | Dropped


class _CopyArgument(ctypes.Structure):
    _fields_ = [
        ("to", ctypes.c_uint64), ("source", ctypes.c_uint64), ("length", ctypes.c_uint64), ("mode", ctypes.c_uint64),
        ("copied", ctypes.c_int64),
    ]  # fmt: skip

    copied: int


def answer(fd: int) -> None:
    """Agree on missing mode with all events. Raises OSError: EINVAL, this kernel has not all of that; EPERM."""
    fcntl.ioctl(fd, _API, struct.pack("<3Q", _VERSION, _EVENTS, 0))


def register_missing(fd: int, start: int, end: int) -> None:
    """Whoever touches what is not there in this span waits. Raises as `register`."""
    fcntl.ioctl(fd, _REGISTER, struct.pack("<4Q", start, end - start, _MODE_MISSING, 0))


def give(fd: int, to: int, source: int, length: int) -> int:
    """Fill missing pages, and wake who waits for them.

    Args:
        source: address of our own.

    Returns:
        The bytes that were filled, which may be fewer than `length`.

    Raises:
        OSError: EAGAIN, events have to be read first; EEXIST, the first page is there; ENOENT, that is not (in one
            mapping and) waited for any more; ESRCH, the address space is gone.
    """
    argument = _CopyArgument(to, source, length, 0, 0)
    if LIBC.ioctl(fd, ctypes.c_ulong(_COPY), ctypes.byref(argument)) < 0 and argument.copied <= 0:
        raise _error()
    return argument.copied


def give_zero(fd: int, address: int) -> None:
    """Fill one page with zeros, as the kernel itself would. Raises as `give`."""
    argument = (ctypes.c_uint64 * 4)(address, _PAGE, 0, 0)
    if LIBC.ioctl(fd, ctypes.c_ulong(_ZEROPAGE), ctypes.byref(argument)) < 0:
        raise _error()


def wake(fd: int, start: int, end: int) -> None:
    """Whoever waits for something in a span looks again."""
    argument = (ctypes.c_uint64 * 2)(start, end - start)
    LIBC.ioctl(fd, ctypes.c_ulong(_WAKE), ctypes.byref(argument))


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), "userfaultfd")


def read_events(fd: int) -> list[Event]:
    """What has happened, in order; nothing where nothing has. Raises OSError."""
    try:
        raw = os.read(fd, _AT_ONCE * _MESSAGE.size)
    except BlockingIOError:
        return []
    return [_event(*message) for message in _MESSAGE.iter_unpack(raw)]


def _event(kind: int, first: int, second: int, third: int) -> Event:
    match kind:
        case 0x12:
            return Fault(second)
        case 0x13:
            return Fork(first & 0xFFFFFFFF)
        case 0x14:
            return Moved(first, second, third)
        case 0x15 | 0x16:
            return Dropped(first, second)
    raise OSError(errno.EPROTO, f"userfaultfd tells of an event {kind:#x}")


@cache
def answers() -> bool:
    """Whether what is missing can be filled here: missing mode with all events, for faults in system calls as well."""
    try:
        fd = syscall(NR["userfaultfd"], ANSWERED)
    except OSError:
        return False
    try:
        with contextlib.suppress(OSError):
            answer(fd)
            return True
        return False
    finally:
        os.close(fd)
