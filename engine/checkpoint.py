"""Checkpoint files: the image of a process on disk, whole or as what changed since another one.

File: frame(ABOUT) · frame(META) · frame(STATE) · chunks · frame(TABLE) · frame(TAIL), with the frames of
engine/image.py. A chunk is what the runs of META have between two addresses that are multiples of CHUNK. TABLE has a
digest for every chunk, and says which are here; the others are those of the parent, a file in the same folder. TAIL
says where TABLE begins.
bpckpt(1) documents the format.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import msgpack

from engine import image as img
from engine.image import Image, ImageError

ABOUT: Final = 16
TABLE: Final = 17
TAIL: Final = 18
CHUNK: Final = 1 << 16
DIGEST_SIZE: Final = 16  # bytes of a SHA-256 that are kept
MAX_CHAIN: Final = 1000  # images that may build on one another
_COPY: Final = 1 << 20
_TAIL_SIZE: Final = img.HEADER_SIZE + 8


@dataclass(frozen=True, slots=True)
class About:
    """Who made it, and what it builds on.

    Attributes:
        id: names this image; 16 random bytes.
        parent: id of the image that has the chunks that are not here; empty: all are here.
        parent_name: that file's name, in the same folder.
        time: seconds since the epoch.
        host: the machine's name.
    """

    id: bytes
    parent: bytes
    parent_name: bytes
    time: float
    host: str


def digest(data: bytes | memoryview) -> bytes:
    """What TABLE keeps of a chunk."""
    return hashlib.sha256(data).digest()[:DIGEST_SIZE]


def chunks(runs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(address, length) of the chunks, in the order in which they are stored."""
    for address, length in runs:
        end = address + length
        while address < end:
            cut = min(end, (address // CHUNK + 1) * CHUNK)
            yield address, cut - address
            address = cut


def _count(runs: list[tuple[int, int]]) -> int:
    """How many chunks there are: what a file claims may be more than any memory holds."""
    return sum((address + length - 1) // CHUNK - address // CHUNK + 1 for address, length in runs)


class Checkpoint:
    """An image file that is open for reading. The descriptor is the object's.

    Raises:
        ImageError: it is no image, is damaged or ends too early.
        OSError: it cannot be read.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        try:
            self._parse()
        except BaseException:
            os.close(fd)
            raise

    def _parse(self) -> None:
        reader = _Reader(self.fd)
        _, body = img.read_frame(reader.read, (ABOUT,), img.MAX_SMALL)
        self.about = _about(body)
        self.image: Image = img.read_head(reader.read)
        self.pages_at = reader.at
        self.size = os.fstat(self.fd).st_size
        tail = _Reader(self.fd, self.size - _TAIL_SIZE)
        if tail.at < self.pages_at:
            raise ImageError("it ends too early")
        _, where = img.read_frame(tail.read, (TAIL,), 8)
        table = _Reader(self.fd, int.from_bytes(where, "little"))
        _, body = img.read_frame(table.read, (TABLE,), img.MAX_META)
        if table.at != self.size - _TAIL_SIZE:
            raise ImageError("its parts do not follow each other")
        self._take_table(body, int.from_bytes(where, "little"))

    def _take_table(self, body: bytes, end: int) -> None:
        try:
            digests, absent = msgpack.unpackb(body)
            if type(digests) is not bytes or type(absent) is not list or not all(type(i) is int for i in absent):
                raise ImageError("its table is damaged")
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise ImageError("its table is damaged") from error
        runs, missing = img.runs_of(self.image), set(absent)
        if len(digests) != DIGEST_SIZE * _count(runs) or (missing and not self.about.parent):
            raise ImageError("its table does not fit")
        self.chunks = list(chunks(runs))
        self.digests = [digests[i : i + DIGEST_SIZE] for i in range(0, len(digests), DIGEST_SIZE)]
        self.offsets: list[int] = []  # -1: in the parent
        at = self.pages_at
        for index, (_, length) in enumerate(self.chunks):
            here = index not in missing
            self.offsets.append(at if here else -1)
            at += length if here else 0
        if at != end:
            raise ImageError("sizes do not add up")

    def read(self, index: int) -> bytes:
        """A chunk that is here. Raises ImageError where it is damaged."""
        _, length = self.chunks[index]
        data = os.pread(self.fd, length, self.offsets[index])
        if len(data) < length or digest(data) != self.digests[index]:
            raise ImageError(f"the pages at {self.chunks[index][0]:#x} are damaged")
        return data

    def known(self) -> dict[tuple[int, int], tuple[int, bytes]]:
        """(address, length) -> (index, digest) of every chunk."""
        return {chunk: (i, self.digests[i]) for i, chunk in enumerate(self.chunks)}

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


class _Reader:
    def __init__(self, fd: int, at: int = 0) -> None:
        self._fd, self.at = fd, at

    def read(self, length: int) -> bytes:
        if self.at < 0:
            raise ImageError("it ends too early")
        parts = []
        while length:
            part = os.pread(self._fd, min(length, _COPY), self.at)
            if not part:
                break
            parts.append(part)
            self.at += len(part)
            length -= len(part)
        return b"".join(parts)


def _about(body: bytes) -> About:
    try:
        about = About(*msgpack.unpackb(body))
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ImageError("its head is damaged") from error
    kinds = (bytes, bytes, bytes, float, str)
    if not all(isinstance(value, kind) for value, kind in zip(asdict(about).values(), kinds, strict=True)):
        raise ImageError("its head is damaged")
    if b"/" in about.parent_name or (about.parent and not about.parent_name):
        raise ImageError("its head is damaged")
    return about


class Chain:
    """An image with all that it builds on.

    Args:
        fd: of the newest, the object's from now on.
        open_beside: opens another file of the same folder, by name, for reading.

    Raises:
        ImageError: one is damaged or another than it should be; OSError: one is not there.
    """

    def __init__(self, fd: int, open_beside: Callable[[bytes], int]) -> None:
        self.links = [Checkpoint(fd)]
        try:
            while self.last.about.parent:
                self._add(open_beside)
        except BaseException:
            self.close()
            raise
        self.newest = self.links[0]
        self._index = [one.known() for one in self.links]

    @property
    def last(self) -> Checkpoint:
        """The oldest of those that are open."""
        return self.links[-1]

    def _add(self, open_beside: Callable[[bytes], int]) -> None:
        about = self.last.about
        name = os.fsdecode(about.parent_name)
        if len(self.links) == MAX_CHAIN or about.parent in [one.about.id for one in self.links]:
            raise ImageError("images build on one another in a circle")
        try:
            fd = open_beside(about.parent_name)
        except OSError as error:
            raise OSError(error.errno, f"{name}, which it builds on: {os.strerror(error.errno or 0)}") from None
        try:
            parent = Checkpoint(fd)
        except ImageError as error:
            raise ImageError(f"{name}, which it builds on: {error.strerror}") from None
        self.links.append(parent)
        if parent.about.id != about.parent:
            raise ImageError(f"{name} is not the image that it builds on any more")

    def pages(self) -> Iterator[tuple[int, bytes]]:
        """(address, bytes) of every chunk of the newest, in order, each checked. Raises ImageError."""
        for chunk, wanted in zip(self.newest.chunks, self.newest.digests, strict=True):
            yield chunk[0], self._find(chunk, wanted)

    def _find(self, chunk: tuple[int, int], wanted: bytes) -> bytes:
        for link, known in zip(self.links, self._index, strict=True):
            index, found = known.get(chunk, (-1, b""))
            if index < 0 or found != wanted:
                break
            if link.offsets[index] >= 0:
                return link.read(index)
        raise ImageError(f"the pages at {chunk[0]:#x} are in none of the images it builds on")

    def close(self) -> None:
        """Close the files."""
        for one in self.links:
            one.close()


class Writer:
    """A new image: `begin`, then the pages by `add`, then `finish`.

    Args:
        fd: an empty file, open for reading and writing; stays the caller's.
        parent: what it builds on, and under which name; it stays the caller's.
    """

    def __init__(self, fd: int, parent: tuple[Checkpoint, bytes] | None = None, identity: bytes = b"") -> None:
        self._fd = fd
        self._parent = parent
        self.about = About(
            identity or secrets.token_bytes(16), parent[0].about.id if parent else b"", parent[1] if parent else b"",
            time.time(), socket.gethostname(),
        )  # fmt: skip
        self._chunks: list[tuple[int, int]] = []
        self._pages_at = self._at = 0

    def begin(self, image: Image) -> None:
        """Write the head. Raises OSError."""
        self._chunks = list(chunks(img.runs_of(image)))
        self.add(img.frame(ABOUT, msgpack.packb(list(asdict(self.about).values()))) + img.head(image))
        self._pages_at = self._at

    def add(self, data: bytes | memoryview) -> None:
        """Write pages. Raises OSError, as when the disk is full."""
        view = memoryview(data)
        while view:
            count = os.pwrite(self._fd, view, self._at)
            self._at += count
            view = view[count:]

    def finish(self) -> int:
        """Digest the pages, drop those that the parent has, complete the file and see that it is on the disk.

        Returns:
            The size of the file.

        Raises:
            OSError.
        """
        known = self._parent[0].known() if self._parent else {}
        digests, absent = [], []
        at = to = self._pages_at
        for index, chunk in enumerate(self._chunks):
            data = os.pread(self._fd, chunk[1], at)
            if len(data) < chunk[1]:
                raise ImageError("it ends too early")
            at += chunk[1]
            digests.append(digest(data))
            if known.get(chunk, (0, b""))[1] == digests[-1]:
                absent.append(index)
                continue
            if to != at - chunk[1]:
                self._at = to
                self.add(data)
            to += chunk[1]
        os.ftruncate(self._fd, to)
        self._at = to
        self.add(img.frame(TABLE, msgpack.packb([b"".join(digests), absent])))
        self.add(img.frame(TAIL, to.to_bytes(8, "little")))
        os.fsync(self._fd)
        return self._at


def merge(chain: Chain, fd: int) -> int:
    """Write a whole image of what a chain holds, under the newest one's id. Returns its size. Raises OSError."""
    writer = Writer(fd, identity=chain.newest.about.id)
    writer.begin(chain.newest.image)
    for _, data in chain.pages():
        writer.add(data)
    return writer.finish()


def describe(chain: Chain) -> dict[str, Any]:
    """What is inside, for people and programs: see bpckpt(1). Raises ImageError."""
    with img.believing_nothing():
        return _describe(chain)


def _describe(chain: Chain) -> dict[str, Any]:
    newest = chain.newest
    image, about = newest.image, newest.about
    return {
        "pid": image.pid,
        "comm": os.fsdecode(image.comm),
        "exe": os.fsdecode(image.files[image.exe].path),
        "cwd": os.fsdecode(image.files[image.cwd].path),
        "uid": image.credentials["uids"][0],
        "gid": image.credentials["gids"][0],
        "threads": len(image.threads),
        "regions": len(image.regions),
        "memory": image.total,
        "size": newest.size,
        "time": about.time,
        "host": about.host,
        "id": about.id.hex(),
        "builds_on": [os.fsdecode(one.about.parent_name) for one in chain.links[:-1]],
        "files": sorted({os.fsdecode(file.path) for file in image.files}),
        "descriptors": [
            {"fds": [fd for fd, _ in entry["fds"]], "kind": entry["kind"], **_path(entry)}
            for entry in image.descriptors
        ],
    }  # fmt: skip


def _path(entry: dict[str, Any]) -> dict[str, str]:
    return {"path": os.fsdecode(entry["path"])} if "path" in entry else {}
