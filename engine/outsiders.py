"""Who else has memory that processes share: /proc of everybody is read for that."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from engine.descriptors.model import open_elsewhere
from engine.image import MappedFile
from engine.linux import procfs
from engine.linux.procfs import Vma

Inode = tuple[int, int, int]
"""Major and minor number of the device, and inode, as /proc/PID/maps has them."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """Shared memory, and where one of them has it; None: no file describes it."""

    vma: Vma
    file: MappedFile | None


def find(objects: Mapping[Inode, Mapped], insiders: Set[int]) -> Iterator[tuple[Inode, str]]:
    """What others than `insiders` (host pids) have of these: which, and a sentence about it."""
    if not objects:
        return
    files = {
        (one.vma.path, one.file.device, one.file.inode): key
        for key, one in objects.items()
        if one.file is not None and one.vma.path.startswith("/memfd:")
    }
    for what in open_elsewhere(insiders, files) if files else ():
        file = objects[files[what]].file
        assert file is not None
        yield files[what], f"it maps {os.fsdecode(file.path)}, which another process has open"
    marks = {key: b" %02x:%02x %d " % key for key in objects}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in insiders:
            continue
        try:
            raw = procfs.read(f"/proc/{name}/maps")
        except OSError:
            continue  # ended meanwhile
        for key, mark in marks.items():
            if mark in raw:
                yield key, f"it shares memory with process {name}"
