"""The master's files as nodes may see them: resolved without symbolic links, within the exports, with digests."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from errno import EACCES, EISDIR, ENOENT
from itertools import islice
from typing import TypeAlias

from bpfs.view.exports import Exports
from bpfs.view.protocol import Attributes
from engine.linux.openat2 import open_beneath

YOUNG = 0.02
"""Seconds after a change in which another one may leave the same time stamp (a tick of the kernel is 4 to 10 ms)."""

KEPT = 200_000
"""Digests kept: a large /usr, about 50 MB."""

BESIDE = 512
"""Names of a directory that are all told of at once: some milliseconds, and 60 kB."""

_OCTAL = re.compile(rb"\\([0-7]{3})")

Looked: TypeAlias = tuple[os.stat_result, str, bytes]
"""Status, link target, and file capabilities (as capabilities(7) stores them) of an object."""

Key: TypeAlias = tuple[int, int, int, int, int]


class Digests:
    """SHA-256 of files by (device, inode, size, mtime, ctime). Safe for threads."""

    def __init__(self) -> None:
        self._known: OrderedDict[Key, str] = OrderedDict()
        self._busy: dict[Key, threading.Lock] = {}
        self._lock = threading.Lock()

    def known(self, status: os.stat_result) -> str:
        """A file's digest if it was computed before; else empty."""
        return self._known.get(_key(status), "")

    def of(self, fd: int) -> tuple[str, os.stat_result]:
        """The digest of an open file, and the status that it belongs to.

        Raises:
            OSError: it cannot be read.
        """
        status = os.fstat(fd)
        key = _key(status)
        with self._lock:
            known = self._known.get(key)
            busy = self._busy.setdefault(key, threading.Lock())
        if known:
            return known, status
        with busy:
            known = self._known.get(key) or self._compute(fd, key)
        with self._lock:
            self._busy.pop(key, None)
        return known, status

    def _compute(self, fd: int, key: Key) -> str:
        with open(os.dup(fd), "rb", buffering=0) as file:
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        status = os.fstat(fd)
        age = time.time() - status.st_ctime
        if _key(status) == key and not -1 < age < YOUNG:
            with self._lock:
                self._known[key] = digest
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
        return digest


def is_written(fd: int) -> bool:
    """Whether a file, open for reading, is open for writing somewhere: a lease is refused then (fcntl(2))."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False  # its file system has none
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _key(status: os.stat_result) -> Key:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class Files:
    """Looks up, lists and opens. Raises OSError as the kernel would for a file system that has just the exports."""

    def __init__(self, exports: Exports) -> None:
        self.exports = exports
        self._root = os.open("/", os.O_PATH | os.O_CLOEXEC)
        self._devices: dict[int, int] = {}

    def look(self, path: str) -> Looked:
        """What there is to know of an object."""
        fd = self._open(path, os.O_PATH)
        try:
            looked = _look(fd)
            if not self.exports.holds(path) and not stat.S_ISDIR(looked[0].st_mode):
                raise OSError(ENOENT, os.strerror(ENOENT), path)
            return looked
        finally:
            os.close(fd)

    def beside(self, path: str) -> list[tuple[str, Looked | None]] | None:
        """The same of all that is in a directory, by name; None where that is more than `BESIDE`.

        Where a file system is mounted is not looked at (None): it may not answer.
        """
        prefix, folder = path.rstrip("/") + "/", self._open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in islice(entries, BESIDE + 1)]
            if len(names) > BESIDE:
                return None
            mounts = _mount_points()
            found: list[tuple[str, Looked | None]] = []
            for name in filter(lambda name: self.exports.shows(prefix + name), names):
                if prefix + name in mounts:
                    found.append((name, None))
                    continue
                with suppress(FileNotFoundError):
                    looked = self._look_beside(folder, name)
                    if stat.S_ISDIR(looked[0].st_mode) or self.exports.holds(prefix + name):
                        found.append((name, looked))
            return found
        finally:
            os.close(folder)

    @staticmethod
    def _look_beside(folder: int, name: str) -> Looked:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            return _look(fd)
        finally:
            os.close(fd)

    def list(self, path: str) -> list[tuple[str, int]]:
        """Names and types (d_type) in a directory."""
        fd = self._open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(fd) as entries:
                prefix = path.rstrip("/") + "/"
                found = [(entry.name, _type(entry)) for entry in entries]
                return [(name, kind) for name, kind in found if self.exports.shows(prefix + name)]
        finally:
            os.close(fd)

    def open(self, path: str) -> int:
        """A regular file's descriptor, for reading."""
        if not self.exports.holds(path):
            raise OSError(ENOENT, os.strerror(ENOENT), path)
        fd = self._open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise OSError(EISDIR if stat.S_ISDIR(status.st_mode) else EACCES, "no regular file", path)
        return fd

    def open_directory(self, path: str) -> int:
        """A directory, as an O_PATH descriptor."""
        return self._open(path, os.O_PATH | os.O_DIRECTORY)

    def _open(self, path: str, flags: int) -> int:
        # A node's kernel never asks for `..`; whoever does might leave the export by it.
        plain = path.startswith("/") and "\0" not in path and not {".", ".."} & set(path.split("/"))
        if not plain or not self.exports.shows(path):
            raise OSError(ENOENT, os.strerror(ENOENT), path)
        # No fifo, no device is opened but by O_PATH: `open` is for what `look` called a regular file.
        return open_beneath(self._root, os.fsencode(path.lstrip("/") or "."), flags | os.O_NOFOLLOW)

    def attributes(self, status: os.stat_result) -> Attributes:
        """As nodes are told them: inode numbers of several file systems are told apart in the upper bits."""
        index = self._devices.setdefault(status.st_dev, len(self._devices))
        mode = status.st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
            mode &= ~0o777  # a fifo or device of the master's: there to be seen, not to be opened
        return Attributes(
            mode, status.st_nlink, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns,
            status.st_ctime_ns, status.st_ino ^ index << 48,
        )  # fmt: skip


def _mount_points() -> set[str]:
    """Where something is mounted: the fifth column, with white space as octal numbers (proc_pid_mountinfo(5))."""
    with open("/proc/self/mountinfo", "rb") as file:
        fields = [line.split(b" ", 5)[4] for line in file]
    return {os.fsdecode(_OCTAL.sub(lambda found: bytes([int(found[1], 8)]), field)) for field in fields}


def _look(fd: int) -> Looked:
    status = os.fstat(fd)
    target = os.readlink("", dir_fd=fd) if stat.S_ISLNK(status.st_mode) else ""
    return status, target, _capability(fd) if stat.S_ISREG(status.st_mode) and status.st_mode & 0o111 else b""


def _type(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return stat.S_IFLNK >> 12
    return (stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else stat.S_IFREG) >> 12


def _capability(fd: int) -> bytes:
    try:
        return os.getxattr(f"/proc/self/fd/{fd}", "security.capability")
    except OSError:
        return b""
