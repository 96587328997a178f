"""The files that a running process maps: what its new place will have to have, before it stands still."""

import contextlib
from typing import Final

from engine import lending
from engine.image import MappedFile
from engine.linux import procfs
from engine.linux.procfs import Vma

_PROT_WRITE: Final = 2
_ROOM: Final = 100_000  # bytes of a message; what does not fit comes when the process stands still
_FIELDS: Final = 100  # bytes of a file beside its path, at most


def mapped_files(pid: int, by_content: bool) -> list[MappedFile]:
    """Regular files that it maps without writing to them, each once, with their digests or without; a forecast.

    Raises:
        OSError: it is gone.
    """
    found: dict[tuple[int, int, int], MappedFile] = {}
    room = _ROOM
    for vma in procfs.parse_maps(procfs.read(f"/proc/{pid}/maps")):
        key = (vma.major, vma.minor, vma.inode)
        if key not in found and room > 0 and vma.path.startswith("/") and not (vma.shared and vma.prot & _PROT_WRITE):
            with contextlib.suppress(OSError):  # unmapped meanwhile
                file = _describe(pid, vma, by_content)
                if file is not None:
                    found[key] = file
                    room -= len(file.path) + _FIELDS
    return list(found.values())


def _describe(pid: int, vma: Vma, by_content: bool) -> MappedFile | None:
    link = f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}"
    lent = lending.original(vma.path, link)
    if lent is not None or vma.deleted or vma.path.startswith(procfs.NO_FILES):
        return lent
    return lending.describe(vma.path, link, by_content=by_content)
