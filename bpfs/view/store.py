"""The node's object store: contents of files by their SHA-256 digest, in one directory.

An object's file has the digest (hexadecimal) as its name, mode 0444, and comes into being whole, by rename. Before
it is used for the first time in a process's life, and whenever its file has changed since, it is checked against its
digest; one that fails is removed, so that it is fetched again. Where the limit is passed, the objects that were used
longest ago go, but never one that is open or mapped: the kernel grants a write lease (fcntl(2), F_SETLEASE) on a file
only when nobody has it open, and a mapping keeps it open.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from errno import EBADMSG, ENOENT
from pathlib import Path

DIGEST = 64  # characters of a digest
CHUNK = 1 << 20
_PARTIAL = ".part-"


@dataclass(slots=True)
class Statistics:
    """Since the store was opened; what is there now is counted in the store itself."""

    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0
    peer_bytes: int = 0  # of these from other nodes
    given_bytes: int = 0  # to other nodes
    evicted: int = 0
    damaged: int = 0


class Store:
    """One directory of objects. Safe for threads; one process a directory.

    Args:
        directory: made where it is not there.
        limit: bytes that objects may take; 0: no limit.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory = directory
        self.limit = limit
        self.statistics = Statistics()
        self.before_removal: Callable[[], None] = lambda: None
        """Called, without any lock, before objects are removed: whoever holds some without need closes them."""
        self._lock = threading.RLock()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._checked: dict[str, tuple[int, int, int, int]] = {}
        self._numbers = itertools.count()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._load()

    def _load(self) -> None:
        found = []
        for entry in os.scandir(self.directory):
            if entry.name.startswith(_PARTIAL):
                os.unlink(entry.path)
            elif is_digest(entry.name) and entry.is_file(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                found.append((max(status.st_atime, status.st_mtime), entry.name, status.st_size))
        self._sizes.update((name, size) for _, name, size in sorted(found))

    @property
    def objects(self) -> int:
        """How many there are."""
        return len(self._sizes)

    @property
    def size(self) -> int:
        """What they take."""
        with self._lock:
            return sum(self._sizes.values())

    def open(self, digest: str) -> int:
        """An object's descriptor, read-only; the caller closes it.

        Raises:
            OSError: ENOENT: it is not here, or was damaged and is not here any more.
        """
        path = self.directory / digest
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            self._forget(digest)
            raise
        try:
            if self._checked.get(digest) != _mark(fd):
                self._check(fd, digest)
        except BaseException:
            os.close(fd)
            raise
        with self._lock:
            if digest in self._sizes:
                self._sizes.move_to_end(digest)
        return fd

    def is_sound(self, digest: str, fd: int) -> bool:
        """Whether an object's file is as it was when it was checked."""
        return self._checked.get(digest) == _mark(fd)

    def _check(self, fd: int, digest: str) -> None:
        with open(os.dup(fd), "rb") as file:
            right = hashlib.file_digest(file, "sha256").hexdigest() == digest
            os.lseek(fd, 0, os.SEEK_SET)  # it is one open file with the duplicate
            if right:
                self._checked[digest] = _mark(fd)
                self._sizes.setdefault(digest, os.fstat(fd).st_size)
                return
        self.statistics.damaged += 1
        with suppress(FileNotFoundError):
            os.unlink(self.directory / digest)
        self._forget(digest)
        raise OSError(ENOENT, "the object was damaged", digest)

    def _forget(self, digest: str) -> None:
        with self._lock:
            self._sizes.pop(digest, None)
            self._checked.pop(digest, None)

    def put(self, digest: str, size: int, chunks: Iterator[memoryview | bytearray | bytes]) -> int:
        """Take in an object; returns its descriptor, read-only.

        Raises:
            OSError: EBADMSG: the bytes are not those of the digest; or as of write(2).
        """
        self._make_room(size)
        partial = self.directory / f"{_PARTIAL}{next(self._numbers)}"
        check = hashlib.sha256()
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        try:
            try:
                for chunk in chunks:
                    check.update(chunk)
                    left = memoryview(chunk)
                    while left:
                        left = left[os.write(fd, left) :]
            finally:
                os.close(fd)
            if check.hexdigest() != digest:
                raise OSError(EBADMSG, "what came does not have the digest", digest)
            os.rename(partial, self.directory / digest)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(partial)
            raise
        fd = os.open(self.directory / digest, os.O_RDONLY | os.O_CLOEXEC)
        with self._lock:
            self._sizes[digest] = size
            self._checked[digest] = _mark(fd)
        self.statistics.fetched_bytes += size
        return fd

    def _make_room(self, size: int) -> None:
        if not self.limit or self.size + size <= self.limit:
            return
        self.before_removal()
        with self._lock:
            over = self.size + size - self.limit
            for digest in list(self._sizes):
                if over <= 0:
                    return
                over -= max(0, self._remove(digest))

    def purge(self, may: Callable[[str], bool] = lambda _: True) -> int:
        """Remove every object that nobody has open or mapped; returns how many went."""
        self.before_removal()
        with self._lock:
            return sum(may(digest) and self._remove(digest) >= 0 for digest in list(self._sizes))

    def _remove(self, digest: str) -> int:
        """Remove one; its bytes, or -1 where it is in use."""
        path = self.directory / digest
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                os.unlink(path)
            except BlockingIOError:
                return -1
            finally:
                os.close(fd)
        size = self._sizes.pop(digest, 0)
        self._checked.pop(digest, None)
        self.statistics.evicted += 1
        return size


def is_digest(text: str) -> bool:
    """Whether it may be an object's name."""
    return len(text) == DIGEST and not set(text) - set("0123456789abcdef")


def _mark(fd: int) -> tuple[int, int, int, int]:
    status = os.fstat(fd)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
