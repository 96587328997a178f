# SPDX-License-Identifier: GPL-2.0-or-later
"""The root of a copy: reads files and directories and sends them to the first receivers."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from errno import ENXIO
from typing import Any

from bpfs.copy.frames import CHUNK, HEAD, Children, Kind, pack_json

_REPORT_S = 0.2  # between two reports of progress


class Sender:
    """Sends sources, each under the last part of its name.

    Attributes:
        failed: something could not be read; it has been reported by name.
    """

    def __init__(self, children: Children, report: Callable[..., None], *, recursive: bool, rate: float) -> None:
        """Args:
        rate: bytes a second at most; 0: no limit.
        """
        self._children = children
        self._report = report
        self._recursive = recursive
        self._rate = rate
        self._began = self._told = time.monotonic()
        self._sent = 0
        self.failed = False

    def run(self, sources: list[str], suffix: str) -> None:
        """Sends everything; `suffix` is put behind the name of each source."""
        self._report(total=sum(self._size(source) for source in sources))
        for source in sources:
            self._source(source, suffix)
        self._children.send(HEAD.pack(Kind.END, 0, 0), b"")
        self._report(sent=self._sent)

    def _size(self, source: str) -> int:
        def size(path: str) -> int:
            try:
                status = os.lstat(path)
            except OSError:
                return 0
            return status.st_size if stat.S_ISREG(status.st_mode) else 0

        if not os.path.isdir(source):
            return size(os.path.realpath(source))
        if not self._recursive:
            return 0
        return sum(size(os.path.join(top, name)) for top, _, names in os.walk(source) for name in names)

    def _source(self, source: str, suffix: str) -> None:
        try:
            status = os.stat(source)
        except OSError as error:
            self._complain(source, error.strerror)
            return
        folder = stat.S_ISDIR(status.st_mode)
        if folder and not self._recursive:
            self._complain(source, "Is a directory (-r copies directories)")
            return
        name = os.path.basename(os.path.abspath(source)) + suffix
        self._children.send(*pack_json(Kind.SOURCE, name=name, folder=folder))
        for path, inner in self._walk(source) if folder else [(source, "")]:
            try:
                # What was named is followed; links further down are copied as what they are.
                self._entry(path, inner, status if not inner else os.lstat(path))
            except OSError as error:
                self._complain(path, error.strerror)

    def _walk(self, top: str) -> Iterator[tuple[str, str]]:
        """Every path below with its path from there, directories before what is in them."""
        yield top, ""
        todo = [(top, "")]
        while todo:
            folder, inner = todo.pop()
            try:
                with os.scandir(folder) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError as error:
                self._complain(folder, error.strerror)
                continue
            for entry in entries:
                below = os.path.join(inner, entry.name)
                yield entry.path, below
                if entry.is_dir(follow_symlinks=False):
                    todo.append((entry.path, below))

    def _entry(self, path: str, inner: str, status: os.stat_result) -> None:
        fields: dict[str, Any] = {
            "path": inner,
            "mode": stat.S_IMODE(status.st_mode),
            "owner": [status.st_uid, status.st_gid],
            "times": [status.st_atime_ns, status.st_mtime_ns],
        }
        if stat.S_ISDIR(status.st_mode):
            self._children.send(*pack_json(Kind.FOLDER, **fields))
        elif stat.S_ISLNK(status.st_mode):
            self._children.send(*pack_json(Kind.LINK, target=os.readlink(path), **fields))
        elif stat.S_ISREG(status.st_mode):
            self._file(path, fields)
        else:
            self._complain(path, "is no file, directory or symbolic link: left out")

    def _file(self, path: str, fields: dict[str, Any]) -> None:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            self._children.send(*pack_json(Kind.FILE, **fields))
            try:
                digest = self._data(file.fileno(), size)
            except OSError as error:
                self._children.send(HEAD.pack(Kind.FILE_BAD, 0, 0), b"")
                raise error from None
        self._children.send(HEAD.pack(Kind.FILE_END, len(digest), size), digest)

    def _data(self, fd: int, size: int) -> bytes:
        # A limited stream comes in small pieces, several a second.
        chunk = max(4096, min(CHUNK, int(self._rate / 8))) if self._rate else CHUNK
        digest, buffer = hashlib.sha256(), memoryview(bytearray(chunk))
        for start, end in extents(fd, size):
            offset = start
            while offset < end:
                got = os.preadv(fd, [buffer[: min(chunk, end - offset)]], offset)
                if not got:
                    raise OSError(0, "it became shorter while it was read")
                head = HEAD.pack(Kind.DATA, got, offset)
                digest.update(head)
                digest.update(buffer[:got])
                self._children.send(head, buffer[:got])
                offset += got
                self._count(got)
        return digest.digest()

    def _count(self, count: int) -> None:
        self._sent += count
        now = time.monotonic()
        if self._rate:
            early = self._began + self._sent / self._rate - now
            if early > 0:
                time.sleep(early)
        if now - self._told > _REPORT_S:
            self._told = now
            self._report(sent=self._sent)

    def _complain(self, path: str, why: str | None) -> None:
        self.failed = True
        self._report(error=f"{path}: {why}")


def extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields start and end of what is no hole below `size`."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == ENXIO:  # only a hole is left
                return
            yield end, size  # no such thing as holes there
            return
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, end
