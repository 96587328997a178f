"""statx(2) without asking the file system's server: a FUSE daemon or an NFS server may be slow, or wait for us."""

import ctypes
import os
from dataclasses import dataclass
from typing import Final

from engine.linux.libc import LIBC

_AT_FDCWD: Final = -100
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_EMPTY_PATH: Final = 0x1000
_AT_NO_AUTOMOUNT: Final = 0x800
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_BASIC_STATS: Final = 0x7FF


class _Timestamp(ctypes.Structure):
    _fields_ = [("sec", ctypes.c_int64), ("nsec", ctypes.c_uint32), ("reserved", ctypes.c_int32)]


class _Statx(ctypes.Structure):
    """struct statx (<linux/stat.h>)."""

    _fields_ = [
        ("mask", ctypes.c_uint32),
        ("blksize", ctypes.c_uint32),
        ("attributes", ctypes.c_uint64),
        ("nlink", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("mode", ctypes.c_uint16),
        ("spare", ctypes.c_uint16),
        ("ino", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("attributes_mask", ctypes.c_uint64),
        ("times", _Timestamp * 4),
        ("rdev_major", ctypes.c_uint32),
        ("rdev_minor", ctypes.c_uint32),
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("rest", ctypes.c_uint64 * 14),
    ]


_statx = LIBC.statx
_statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
_statx.restype = ctypes.c_int
_buffer = _Statx()
_address = ctypes.addressof(_buffer)


@dataclass(frozen=True, slots=True)
class Status:
    """What the kernel knows by itself of an object; numbers of devices as os.makedev makes them."""

    mode: int
    dev: int
    ino: int
    rdev: int
    nlink: int
    size: int
    uid: int
    gid: int

    def same(self, other: "Status") -> bool:
        """Whether both are one object (on one machine)."""
        return self.ino == other.ino and self.dev == other.dev


def of_path(path: bytes, follow: bool = True) -> Status:
    """The object a path leads to; `follow`: a symbolic link at its end. Raises OSError."""
    return _call(_AT_FDCWD, path, _AT_NO_AUTOMOUNT | (0 if follow else _AT_SYMLINK_NOFOLLOW))


def of_descriptor(fd: int) -> Status:
    """The object of an open descriptor. Raises OSError."""
    return _call(fd, b"", _AT_EMPTY_PATH)


def _call(fd: int, path: bytes, flags: int) -> Status:
    if _statx(fd, path, flags | _AT_STATX_DONT_SYNC, _STATX_BASIC_STATS, _address):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fsdecode(path) or f"descriptor {fd}")
    b = _buffer
    dev, rdev = os.makedev(b.dev_major, b.dev_minor), os.makedev(b.rdev_major, b.rdev_minor)
    return Status(b.mode, dev, b.ino, rdev, b.nlink, b.size, b.uid, b.gid)
