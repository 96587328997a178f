# SPDX-License-Identifier: GPL-2.0-or-later
"""Who opens a file of one file system waits for our word: fanotify(7) with permission events.

System calls without policy, as in bpfs.kernel. The kernel lets everybody go on when the last descriptor is closed, so
the death of who listens holds nobody up.
"""

from __future__ import annotations

import ctypes
import os
import struct
from errno import EAGAIN

_CLASS_CONTENT = 4  # include/uapi/linux/fanotify.h
_CLOEXEC, _NONBLOCK, _UNLIMITED_QUEUE = 1, 2, 0x10
_MARK_ADD, _MARK_REMOVE, _MARK_FILESYSTEM = 1, 2, 0x100
_OPEN_PERM, _ACCESS_PERM = 0x10000, 0x20000
_ALLOW = 1

_EVENT = struct.Struct("=IBBHQii")  # event_len, vers, reserved, metadata_len, mask, fd, pid
_RESPONSE = struct.Struct("=iI")
_AT_FDCWD = -100

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_init.argtypes = (ctypes.c_uint, ctypes.c_uint)
_libc.fanotify_mark.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)


def init() -> int:
    """A descriptor for permission events, not blocking.

    Raises:
        OSError: EPERM; EINVAL, ENOSYS, the kernel was built without.
    """
    flags = _CLASS_CONTENT | _CLOEXEC | _NONBLOCK | _UNLIMITED_QUEUE
    return _checked(_libc.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC | os.O_LARGEFILE), "fanotify")


def watch(fd: int, folder: str, on: bool) -> None:
    """Has who opens or reads a file of the file system that `folder` is on wait, or not any more. Raises OSError."""
    flags = (_MARK_ADD if on else _MARK_REMOVE) | _MARK_FILESYSTEM
    _checked(_libc.fanotify_mark(fd, flags, _OPEN_PERM | _ACCESS_PERM, _AT_FDCWD, os.fsencode(folder)), folder)


def read(fd: int) -> list[int]:
    """Descriptors of the files that somebody waits for just now: each is to be given to `allow`. Raises OSError."""
    try:
        data = os.read(fd, 65536)
    except OSError as error:
        if error.errno == EAGAIN:
            return []
        raise
    found = []
    while data:
        length, _, _, _, _, file, _ = _EVENT.unpack_from(data)
        data = data[length:]
        if file >= 0:
            found.append(file)
    return found


def allow(fd: int, file: int) -> None:
    """Lets who waits for this file go on, and closes our descriptor of it. Raises OSError."""
    try:
        os.write(fd, _RESPONSE.pack(file, _ALLOW))
    finally:
        os.close(file)


def _checked(result: int, subject: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), subject)
    return int(result)
