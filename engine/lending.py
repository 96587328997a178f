"""Files that a process maps or runs and its new place does not have: their content comes along.

The destination makes a memfd of each, which is mapped, and run, in the file's place. What is known to be missing is
sent while the process still runs (engine/mapped.py); for what shows itself when it stands still, the destination asks
when all the rest is there. What the memfd stands for is kept in an attribute of it that only the machine's root can set
(xattr(7), trusted.*): the process goes on from here as one that has the file itself, and finds that again where it is.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import msgpack

from engine import digests
from engine import image as img
from engine.image import Image, ImageError, MappedFile
from engine.spans import Spans, merge, size, without
from engine.stream import Stream

_NAME: Final = "bpfs:"
_ATTRIBUTE: Final = "trusted.bpfs"
_CHUNK: Final = 1 << 20
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
_MAX_NAME: Final = 200  # bytes, of the 249 that memfd_create(2) takes


def borrowed_name(path: str) -> str:
    """The name, without its folder, of the file that a memfd of ours stands for; empty: by its path it is none."""
    prefix = f"/memfd:{_NAME}"
    return path.removeprefix(prefix).removesuffix(" (deleted)") if path.startswith(prefix) else ""


def original(path: str, link: str) -> MappedFile | None:
    """The file that a memfd of ours stands for; None: it is none.

    Args:
        path: as maps or exe show it.
        link: leads to it.
    """
    if not borrowed_name(path):
        return None
    try:
        fields = msgpack.unpackb(os.getxattr(link, _ATTRIBUTE))
        return MappedFile(*fields)
    except (OSError, ValueError, TypeError, msgpack.UnpackException):
        return None


def describe(path: str, link: str, writable: bool = False, by_content: bool = False) -> MappedFile:
    """A file that has a name. Raises OSError.

    Args:
        path: as maps or exe show it.
        link: leads to it.
        by_content: with its digest, where it is one that only a change of its own would make another.
    """
    info = os.stat(link)
    is_content = by_content and not writable and stat.S_ISREG(info.st_mode)
    digest = digests.of_link(link, info) if is_content else b""
    return MappedFile(
        os.fsencode(path), info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, writable, digest=digest
    )


# ---- the destination ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Borrowed:
    """A memfd that stands for a file.

    Attributes:
        index: of the image's file by which the content is asked for.
        fd: of the memfd; read-only as soon as that is whole.
        there: the parts that are in it, where they came ahead.
    """

    file: MappedFile
    index: int
    fd: int
    there: Spans | None = None

    def open(self) -> int:
        """Another descriptor of it, read-only. Raises OSError."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close it, unless that has been done."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Lending:
    """What a destination borrows.

    Args:
        lends: whether the source can give anything: not where an image comes from a disk.
        ahead: what came before the image. Not ours to close.
    """

    def __init__(self, lends: bool, ahead: Iterable[Borrowed] = ()) -> None:
        self._lends = lends
        self._ahead = list(ahead)
        self._borrowed: dict[tuple[bytes, int, int], Borrowed] = {}

    def __bool__(self) -> bool:
        return bool(self._borrowed)

    def may_borrow(self, image: Image, index: int) -> bool:
        """Whether something may stand for a file that is not here."""
        return self._lends and _may_be_lent(image, index)

    def borrow(self, image: Image, index: int) -> int:
        """A descriptor, read-only and the caller's, of a memfd that stands for a file. Raises OSError."""
        file = image.files[index]
        one = self._came_ahead(image, index) or self._borrowed.get(_key(file))
        if one is None:
            one = self._borrowed[_key(file)] = Borrowed(file, index, _make(file))
        elif any(region.file == index for region in image.regions):
            one.index = index  # what is mapped is known by this one
        return one.open()

    def _came_ahead(self, image: Image, index: int) -> Borrowed | None:
        file = image.files[index]
        for one in self._ahead:
            if one.file == file and not without(_mapped(image, index, file.size), one.there or []):
                return one
        return None

    def fill(self, stream: Stream) -> None:
        """Ask the source for the contents, and take them. Raises OSError."""
        stream.send(img.frame(img.LACKS, msgpack.packb([one.index for one in self._borrowed.values()])))
        for one in self._borrowed.values():
            _take(stream, one)
            one.close()

    def close(self) -> None:
        """Close what is open still."""
        for one in self._borrowed.values():
            one.close()


def receive_ahead(stream: Stream, files: Iterable[MappedFile]) -> list[Borrowed]:
    """Take what `engine.mapped.send_ahead` sends of these. The caller closes them. Raises OSError."""
    taken: list[Borrowed] = []
    try:
        for file in files:
            one = Borrowed(file, -1, _make(file))
            taken.append(one)
            one.there = _take(stream, one)
            readable = one.open()  # a file that somebody can write to cannot be run
            one.close()
            one.fd = readable
    except BaseException:
        for one in taken:
            one.close()
        raise
    return taken


def _take(stream: Stream, one: Borrowed) -> Spans:
    _, body = img.read_frame(stream.receive, (img.CONTENT,), img.MAX_SMALL)
    mode, uid, gid, spans = _unpack(body)
    for start, end in spans:
        if not 0 <= start < end <= one.file.size:
            raise ImageError("content lies outside of its file")
        _take_span(stream, one.fd, start, end)
    os.fchown(one.fd, uid, gid)
    os.fchmod(one.fd, mode)
    fcntl.fcntl(one.fd, fcntl.F_ADD_SEALS, _SEALS)
    return merge(spans)


def _key(file: MappedFile) -> tuple[bytes, int, int]:
    return file.path, file.device, file.inode


def _make(file: MappedFile) -> int:
    name = os.fsdecode(os.path.basename(file.path).removesuffix(b" (deleted)")[:_MAX_NAME])
    fd = os.memfd_create(_NAME + name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, file.size)
        os.setxattr(fd, _ATTRIBUTE, msgpack.packb(file.plain()))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _unpack(body: bytes) -> tuple[int, int, int, list[tuple[int, int]]]:
    try:
        mode, uid, gid, spans = msgpack.unpackb(body)
        return int(mode) & 0o777, int(uid), int(gid), [(int(start), int(end)) for start, end in spans]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ImageError(f"{type(error).__name__}: {error}") from error


def _take_span(stream: Stream, fd: int, start: int, end: int) -> None:
    buffer = memoryview(bytearray(min(_CHUNK, end - start)))
    while start < end:
        part = buffer[: end - start]
        stream.receive_into(part)
        start += os.pwrite(fd, part, start)


# ---- the source --------------------------------------------------------------------------------------------


def _may_be_lent(image: Image, index: int) -> bool:
    """It is a file that nobody can write through the process."""
    file = image.files[index]
    return index != image.cwd and not file.writable and not file.nameless


def send(stream: Stream, body: bytes, image: Image, pid: int, live: str) -> int:
    """Send what the destination lacks. Returns the bytes.

    Args:
        body: of its LACKS.
        pid: of the process, which stands still.
        live: the folder in /proc of a living thread of it.

    Raises:
        OSError: a file cannot be read.
    """
    total = 0
    for index in indices(body, image):
        file, link = image.files[index], _link(image, index, pid, live)
        total += send_content(stream, file, link, _mapped(image, index, file.size))
    return total


def send_nothing(stream: Stream) -> None:
    """Say that there is nothing of a file that was asked for."""
    stream.send(img.frame(img.CONTENT, msgpack.packb([0, 0, 0, []])))


def send_content(stream: Stream, file: MappedFile, link: str, spans: Spans) -> int:
    """Send parts of the file that a link leads to. Returns the bytes. Raises OSError."""
    fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(95, f"{os.fsdecode(file.path)} is no regular file")
        head = [stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, spans]
        stream.send(img.frame(img.CONTENT, msgpack.packb(head)))
        for start, end in spans:
            _send_span(stream, fd, start, end)
    finally:
        os.close(fd)
    return size(spans)


def indices(body: bytes, image: Image) -> list[int]:
    """Which files of an image a destination lacks, as its LACKS says. Raises ImageError."""
    with contextlib.suppress(ValueError, msgpack.UnpackException):
        found = msgpack.unpackb(body)
        if type(found) is list and all(type(i) is int and 0 <= i < len(image.files) for i in found):
            return [i for i in found if _may_be_lent(image, i)]
    raise ImageError("it lacks what the image does not have")


def _link(image: Image, index: int, pid: int, live: str) -> str:
    region = next((r for r in image.regions if r.file == index), None)
    return f"{live}/exe" if region is None else f"/proc/{pid}/map_files/{region.start:x}-{region.end:x}"


def _mapped(image: Image, index: int, size: int) -> list[tuple[int, int]]:
    """The parts of a file that are mapped; all of one that is only run."""
    spans = [(r.offset, min(r.offset + r.end - r.start, size)) for r in image.regions if r.file == index]
    return merge(spans) if spans else [(0, size)]


def _send_span(stream: Stream, fd: int, start: int, end: int) -> None:
    while start < end:
        part = os.pread(fd, min(_CHUNK, end - start), start)
        if not part:  # cut short meanwhile: what was mapped there is gone, here as well
            part = bytes(min(_CHUNK, end - start))
        stream.send(part)
        start += len(part)
