"""The files that a running process maps: what its new place will have to have, before it stands still."""

import contextlib
from collections.abc import Iterator
from typing import Final

from engine import lending
from engine.image import MappedFile
from engine.linux import procfs
from engine.linux.procfs import Vma
from engine.spans import merge
from engine.stream import Stream

_PROT_WRITE: Final = 2
_ROOM: Final = 100_000  # bytes of a message; what does not fit comes when the process stands still
_FIELDS: Final = 100  # bytes of a file beside its path, at most


def mapped_files(pid: int, by_content: bool) -> list[MappedFile]:
    """Regular files that it maps without writing to them, each once, with their digests or without; a forecast.

    Raises:
        OSError: it is gone.
    """
    found: list[MappedFile] = []
    room = _ROOM
    for file, _ in _each(pid, by_content):
        room -= len(file.path) + _FIELDS
        found.append(file)
        if room <= 0:
            break
    return found


def send_ahead(stream: Stream, pid: int, files: list[MappedFile]) -> int:
    """Send what it maps of these, for `engine.lending.receive_ahead`. Returns the bytes.

    What it does not map any more, or not as it was, comes as empty: that is asked for again, if need be.

    Raises:
        OSError: it is gone, or a file cannot be read.
    """
    mapped = list(_each(pid, any(file.digest for file in files)))
    total = 0
    for file in files:
        vmas = next((vmas for found, vmas in mapped if found == file), None)
        if vmas is None:
            lending.send_nothing(stream)
            continue
        spans = merge((vma.offset, min(vma.offset + vma.end - vma.start, file.size)) for vma in vmas)
        total += lending.send_content(stream, file, _link(pid, vmas[0]), spans)
    return total


def _each(pid: int, by_content: bool) -> Iterator[tuple[MappedFile, list[Vma]]]:
    """Each of those files, and where it is mapped."""
    groups: dict[tuple[int, int, int], list[Vma]] = {}
    for vma in procfs.parse_maps(procfs.read(f"/proc/{pid}/maps")):
        if vma.path.startswith("/"):
            groups.setdefault((vma.major, vma.minor, vma.inode), []).append(vma)
    for vmas in groups.values():
        if not any(vma.shared and vma.prot & _PROT_WRITE for vma in vmas):
            with contextlib.suppress(OSError):  # unmapped meanwhile
                file = _describe(pid, vmas[0], by_content)
                if file is not None:
                    yield file, vmas


def _describe(pid: int, vma: Vma, by_content: bool) -> MappedFile | None:
    link = _link(pid, vma)
    lent = lending.original(vma.path, link)
    if lent is not None or vma.deleted or vma.path.startswith(procfs.NO_FILES):
        return lent
    return lending.describe(vma.path, link, by_content=by_content)


def _link(pid: int, vma: Vma) -> str:
    return f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}"
