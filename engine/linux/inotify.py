"""<linux/inotify.h>, inotify(7), open_by_handle_at(2)."""

import errno
import os
import struct
from typing import Final

from engine.linux.libc import syscall
from engine.linux.x86_64 import NR

_INIT1: Final = 294
_ADD_WATCH: Final = 254
_RM_WATCH: Final = 255
_OPEN_BY_HANDLE_AT: Final = 304
_SETNEXTWD: Final = 0x40044900  # INOTIFY_IOC_SETNEXTWD, Linux 4.16 with CONFIG_CHECKPOINT_RESTORE
_MOST_TRIES: Final = 20000  # watches made and removed to reach a number on a kernel without SETNEXTWD


def create() -> int:
    """A queue without watches, close-on-exec. Raises OSError."""
    return syscall(_INIT1, os.O_CLOEXEC)


def add_watch(fd: int, target: int, mask: int, number: int) -> None:
    """Watch the object of descriptor `target` under a watch number above all that were used. Raises OSError."""
    path = b"/proc/self/fd/%d\0" % target
    try:
        syscall(NR["ioctl"], fd, _SETNEXTWD, number)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        _use_up(fd, path, number)
    given = syscall(_ADD_WATCH, fd, path, mask)
    if given != number:
        raise OSError(errno.EBUSY, f"inotify watch {number} became {given}")


def watch(fd: int, target: int, mask: int) -> int:
    """Watch the object of descriptor `target`; returns the watch number, the same for the same object.

    Raises:
        OSError: ENOSPC: the user has too many watches.
    """
    return syscall(_ADD_WATCH, fd, b"/proc/self/fd/%d\0" % target, mask)


def _use_up(fd: int, path: bytes, number: int) -> None:
    for _ in range(_MOST_TRIES):
        given = syscall(_ADD_WATCH, fd, path, 0x200)  # IN_DELETE
        syscall(_RM_WATCH, fd, given)
        if given >= number - 1:
            return


def open_by_handle(mount: int, kind: int, handle: bytes) -> int:
    """The object of a handle, as an O_PATH descriptor; `mount` is any descriptor of the file system. Raises OSError."""
    raw = struct.pack("=Ii", len(handle), kind) + handle
    return syscall(_OPEN_BY_HANDLE_AT, mount, raw, os.O_PATH | os.O_CLOEXEC)
