"""The files that a running process maps: what its new place will have to have, before it stands still."""

import contextlib
import os
from typing import Final

from engine import lending
from engine.image import MappedFile
from engine.linux import procfs
from engine.linux.procfs import Vma

_NO_FILES: Final = ("/memfd:", "/SYSV", "/dev/", "/secretmem")


def mapped_files(pid: int) -> list[MappedFile]:
    """Regular files that are mapped for reading only, each once; a forecast. Raises OSError: it is gone."""
    found: dict[tuple[int, int, int], MappedFile] = {}
    for vma in procfs.parse_maps(procfs.read(f"/proc/{pid}/maps")):
        key = (vma.major, vma.minor, vma.inode)
        if key not in found and vma.path.startswith("/") and not vma.shared:
            with contextlib.suppress(OSError):  # unmapped meanwhile
                file = _describe(pid, vma)
                if file is not None:
                    found[key] = file
    return list(found.values())


def _describe(pid: int, vma: Vma) -> MappedFile | None:
    link = f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}"
    lent = lending.original(vma.path, link)
    if lent is not None or vma.deleted or vma.path.startswith(_NO_FILES):
        return lent
    info = os.stat(link)
    return MappedFile(os.fsencode(vma.path), info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, False)
