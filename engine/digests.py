"""SHA-256 of files, computed once and kept by (device, inode, size, mtime, ctime) for all workers of a daemon.

A file of the master's view has been checked against its digest already, and its server says it: an attribute
(xattr(7)) that only that file system can answer for. All others are read.
"""

import hashlib
import mmap
import os
import struct
import time
from typing import Final

from engine.linux import mounts

DIGEST_SIZE: Final = 32  # bytes
ATTRIBUTE: Final = "trusted.bpfs.digest"  # in hexadecimal
VIEW: Final = "fuse.bpview"  # the type of a view's file system
_YOUNG_S: Final = 0.02  # after a change in which another one may leave the same time (a tick is 4 to 10 ms)
_IDENTITY: Final = struct.Struct("<QQQqq")
_SLOTS: Final = 4096
_PROBES: Final = 4
_KEY: Final = 16  # bytes
_CHECK: Final = 8  # bytes: several workers write at once, and without a lock
_AT: Final = _KEY + DIGEST_SIZE  # of the check
_ENTRY: Final = _AT + _CHECK
_SLOT: Final = 64

_table = mmap.mmap(-1, _SLOTS * _SLOT)  # shared by all forks


def of_descriptor(fd: int) -> bytes:
    """The digest of an open regular file. Raises OSError."""
    return _known_or(os.fstat(fd), fd)


def of_link(link: str, info: os.stat_result) -> bytes:
    """The digest of what a magic link of /proc leads to; empty where it cannot be read.

    Args:
        info: its status.
    """
    try:
        return _known_or(info, link)
    except OSError:  # a server that has other rights for root
        return b""


def _known_or(info: os.stat_result, where: int | str) -> bytes:
    key = _key(info)
    return _look_up(key) or _compute(info, key, where)


def _compute(info: os.stat_result, key: bytes, where: int | str) -> bytes:
    digest = _of_view(where) if mounts.type_of(info.st_dev) == VIEW else b""
    if digest:
        _keep(key, digest)
        return digest
    fd = os.dup(where) if isinstance(where, int) else os.open(where, os.O_RDONLY | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").digest()
        after = os.fstat(fd)
    if _key(after) == key and not -1 < time.time() - after.st_ctime < _YOUNG_S:
        _keep(key, digest)
    return digest


def _of_view(where: int | str) -> bytes:
    try:
        digest = bytes.fromhex(os.getxattr(where, ATTRIBUTE).decode())
    except (OSError, ValueError):
        return b""
    return digest if len(digest) == DIGEST_SIZE else b""


def _key(info: os.stat_result) -> bytes:
    identity = _IDENTITY.pack(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    return hashlib.blake2b(identity, digest_size=_KEY).digest()


def _places(key: bytes) -> list[int]:
    first = int.from_bytes(key[:4], "little")
    return [(first + i) % _SLOTS * _SLOT for i in range(_PROBES)]


def _checked(key: bytes, digest: bytes) -> bytes:
    return hashlib.blake2b(key + digest, digest_size=_CHECK).digest()


def _look_up(key: bytes) -> bytes:
    for place in _places(key):
        if _table[place : place + _KEY] == key:
            digest, check = _table[place + _KEY : place + _AT], _table[place + _AT : place + _ENTRY]
            if check == _checked(key, digest):
                return digest
    return b""


def _keep(key: bytes, digest: bytes) -> None:
    places = _places(key)
    free = (place for place in places if _table[place : place + _KEY] in (key, bytes(_KEY)))
    place = next(free, places[key[4] % _PROBES])  # else one gives way, and is computed again when it is wanted
    _table[place : place + _ENTRY] = key + digest + _checked(key, digest)
