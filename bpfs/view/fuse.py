"""<linux/fuse.h>: what the view's daemon needs of the protocol on /dev/fuse. No policy, no state."""

from __future__ import annotations

import enum
import fcntl
import os
import stat
import struct
from typing import Final

from bpfs.view.protocol import Attributes

ROOT: Final = 1  # FUSE_ROOT_ID

REQUEST = struct.Struct("=IIQQIIIHH")  # fuse_in_header: len opcode unique nodeid uid gid pid extlen padding
_ANSWER = struct.Struct("=IiQ")  # fuse_out_header
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("=QQQQII")
_ATTR_OUT = struct.Struct("=QII")
_OPEN_OUT = struct.Struct("=QIi")
_INIT_IN = struct.Struct("=IIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHII24x")
_STATFS = struct.Struct("=QQQQQIIII24x")
_DIRENT = struct.Struct("=QQII")
OPEN_IN = struct.Struct("=II")  # flags open_flags
READ_IN = struct.Struct("=QQIIQII")  # fh offset size ...
FORGET_IN = struct.Struct("=Q")
BATCH_IN = struct.Struct("=II")
FORGET_ONE = struct.Struct("=QQ")
XATTR_IN = struct.Struct("=II")

_ASYNC_READ, _PARALLEL_DIROPS, _MAX_PAGES, _CACHE_SYMLINKS, _INIT_EXT = 1, 1 << 18, 1 << 22, 1 << 23, 1 << 30
_PASSTHROUGH, _HAS_RESEND = 1 << 5, 1 << 7  # of flags2

FMODE_EXEC: Final = 0x20  # among the flags of an open for execve(2): include/linux/fs.h
FOPEN_KEEP_CACHE: Final = 2
FOPEN_CACHE_DIR: Final = 8
FOPEN_NOFLUSH: Final = 32
FOPEN_PASSTHROUGH: Final = 128

_NOTIFY_INVAL_INODE, _NOTIFY_INVAL_ENTRY, _NOTIFY_RESEND = 2, 3, 7
_EXPIRE_ONLY = 1
_BACKING_OPEN = 1 << 30 | 16 << 16 | 229 << 8 | 1  # _IOW(229, 1, struct fuse_backing_map)
_BACKING_CLOSE = 1 << 30 | 4 << 16 | 229 << 8 | 2  # _IOW(229, 2, uint32_t)

READ_SIZE: Final = 1 << 20  # bytes of one READ at most; also max_read of the mount
BUFFER: Final = 1 << 16  # of a request: no writes come, so paths are the longest


class Op(enum.IntEnum):
    """Opcodes that are answered; all others are ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    GETXATTR = 22
    LISTXATTR = 23
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


def attr(it: Attributes) -> bytes:
    """struct fuse_attr."""
    seconds = [divmod(ns, 1_000_000_000) for ns in (it.mtime_ns, it.mtime_ns, it.ctime_ns)]
    return _ATTR.pack(
        it.ino, it.size, (it.size + 511) // 512, *[s & (1 << 64) - 1 for s, _ in seconds], *[ns for _, ns in seconds],
        it.mode, it.nlink, it.uid, it.gid, 0, 4096, 0,
    )  # fmt: skip


def entry_out(node: int, generation: int, it: Attributes | None, valid: int) -> bytes:
    """struct fuse_entry_out; node 0 (and no attributes): there is nothing of that name."""
    body = attr(it) if it is not None else bytes(_ATTR.size)
    return _ENTRY.pack(node, generation, valid, valid, 0, 0) + body


def attr_out(it: Attributes, valid: int) -> bytes:
    """struct fuse_attr_out; `valid` in seconds."""
    return _ATTR_OUT.pack(valid, 0, 0) + attr(it)


def open_out(handle: int, flags: int, backing: int = 0) -> bytes:
    """struct fuse_open_out."""
    return _OPEN_OUT.pack(handle, flags, backing)


def statfs_out(objects: int) -> bytes:
    """struct fuse_statfs_out of a file system that is full."""
    return _STATFS.pack(0, 0, 0, objects, 0, 4096, 255, 4096, 0)


def dirent(ino: int, offset: int, name: bytes, kind: int) -> bytes:
    """struct fuse_dirent, padded."""
    return (_DIRENT.pack(ino, offset, len(name), kind) + name).ljust((_DIRENT.size + len(name) + 7) & ~7, b"\0")


def accept_init(body: bytes) -> tuple[bytes, bool, bool]:
    """Answer INIT: struct fuse_init_out, and whether the kernel can do passthrough and resending."""
    _, minor, readahead, flags = _INIT_IN.unpack_from(body)
    flags2 = struct.unpack_from("=I", body, _INIT_IN.size)[0] if flags & _INIT_EXT and len(body) >= 20 else 0
    both = flags2 & (_PASSTHROUGH | _HAS_RESEND)
    wanted = flags & (_ASYNC_READ | _PARALLEL_DIROPS | _MAX_PAGES | _CACHE_SYMLINKS | _INIT_EXT)
    depth = 1 if both & _PASSTHROUGH else 0
    out = _INIT_OUT.pack(7, min(minor, 40), readahead, wanted, 64, 48, 4096, 1, READ_SIZE >> 12, 0, both, depth)
    return out, bool(both & _PASSTHROUGH), bool(both & _HAS_RESEND)


class Device:
    """An open /dev/fuse with its mount. Writes are whole, so any thread may answer."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def answer(self, unique: int, body: bytes = b"") -> None:
        """Answer a request. Whoever has been killed meanwhile needs none: that is no error."""
        self._write(_ANSWER.pack(_ANSWER.size + len(body), 0, unique), body)

    def refuse(self, unique: int, errno: int) -> None:
        """Answer with an error."""
        self._write(_ANSWER.pack(_ANSWER.size, -errno, unique), b"")

    def forget_name(self, parent: int, name: bytes) -> None:
        """Have the kernel look a name up anew; who has it open sees no change (before Linux 6.2: a `(deleted)`)."""
        self._notify(_NOTIFY_INVAL_ENTRY, struct.pack("=QII", parent, len(name), _EXPIRE_ONLY) + name + b"\0")

    def forget_content(self, node: int) -> None:
        """Have the kernel ask for attributes, pages and listing of an inode anew."""
        self._notify(_NOTIFY_INVAL_INODE, struct.pack("=Qqq", node, 0, 0))

    def resend(self) -> None:
        """Have the kernel send again whatever was read and not answered (Linux 6.9)."""
        self._notify(_NOTIFY_RESEND, b"")

    def _notify(self, code: int, body: bytes) -> None:
        self._write(_ANSWER.pack(_ANSWER.size + len(body), code, 0), body)

    def _write(self, header: bytes, body: bytes) -> None:
        try:
            os.write(self.fd, header + body)
        except (FileNotFoundError, NotADirectoryError):
            pass  # the request was given up; or the kernel knows no such name or inode

    def open_backing(self, fd: int) -> int:
        """Register a file for passthrough; its id. Raises OSError."""
        # The id is the return value; a bytearray, so that Python hands its address on.
        return int(fcntl.ioctl(self.fd, _BACKING_OPEN, bytearray(struct.pack("=iIQ", fd, 0, 0))))

    def close_backing(self, number: int) -> None:
        """Give an id back; what is mapped or open stays so."""
        fcntl.ioctl(self.fd, _BACKING_CLOSE, bytearray(struct.pack("=I", number)))


def mount_data(fd: int) -> str:
    """Options of mount(2) for the view."""
    who = "user_id=0,group_id=0,allow_other,default_permissions"
    return f"fd={fd},rootmode={stat.S_IFDIR | 0o755:o},{who},max_read={READ_SIZE}"
