"""System V shared memory (shmget(2)) of processes that move together, and that nobody else has attached.

It moves with them, by id and key: what is left where they were is removed. On the way its content is that of any shared
memory (engine/kin.py); each process maps it as such first, and attaches it in the same place when its pages are there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

from engine.image import Image, Region
from engine.linux import procfs, shm
from engine.linux.procfs import Vma
from engine.runner import Calls

PREFIX: Final = "/SYSV"
_PAGE: Final = 4096
_PROT_WRITE: Final = 2
_PROT_EXEC: Final = 4


class Segments:
    """Those of one IPC namespace that we have seen or made."""

    def __init__(self, pid: int) -> None:
        """Args:
        pid: of a process in the namespace.

        Raises:
            OSError: it is gone.
        """
        self._namespace = os.open(f"/proc/{pid}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
        self._known: list[shm.Segment] = []
        self._attached: list[int] = []

    def look(self, segment: int) -> shm.Segment:
        """One that is there. Raises OSError."""
        with shm.namespace(self._namespace):
            found = shm.stat(segment)
        self._known.append(found)
        return found

    def make(self, like: shm.Segment) -> int:
        """An empty one that is like another. Returns a descriptor of its memory.

        Raises:
            OSError: EEXIST, its id or key is another's here.
        """
        with shm.namespace(self._namespace):
            shm.create(like)
            self._known.append(like)
            address = shm.attach(like.id)
            self._attached.append(address)
            if like.mode & shm.SHM_DEST:
                shm.remove(like.id)
        end = address + (like.size + _PAGE - 1 & -_PAGE)
        return os.open(f"/proc/self/map_files/{address:x}-{end:x}", os.O_RDWR | os.O_CLOEXEC)

    def remove(self) -> None:
        """None of them is here any more."""
        with shm.namespace(self._namespace):
            for one in self._known:
                if not one.mode & shm.SHM_DEST:
                    shm.remove(one.id)
        self._known = []

    def close(self) -> None:
        """Let go of what we have of them."""
        for address in self._attached:
            shm.detach(address)
        os.close(self._namespace)
        self._attached, self._known = [], []


def is_whole(vmas: Sequence[Vma], size: int) -> bool:
    """Whether mappings of one segment are attachments of all of it, one after the other."""
    end = size + _PAGE - 1 & -_PAGE
    return all(_covers([(v.offset, v.offset + v.end - v.start) for v in by], end) for by in _attachments(vmas))


def _attachments(vmas: Sequence[Vma]) -> Iterator[list[Vma]]:
    ordered = sorted(vmas, key=lambda v: (v.start - v.offset, v.start))
    return (list(by) for _, by in groupby(ordered, lambda v: v.start - v.offset))


def _covers(spans: Sequence[tuple[int, int]], end: int) -> bool:
    at = 0
    for first, last in spans:
        if first != at:
            return False
        at = last
    return at == end


def mappings(pid: int, like: Vma) -> list[Vma]:
    """All mappings of a segment that a process has. Raises OSError."""
    key = (like.major, like.minor, like.inode)
    every = procfs.parse_maps(procfs.read(f"/proc/{pid}/maps"))
    return [vma for vma in every if (vma.major, vma.minor, vma.inode) == key and vma.path.startswith(PREFIX)]


def count(pids: Sequence[int], vma: Vma) -> int:
    """Attachments, as the kernel counts them, that these processes have. Raises OSError."""
    return sum(len(mappings(pid, vma)) for pid in pids)


def attach_rows(calls: Calls, image: Image) -> None:
    """Add what turns mappings of the memory of segments, which are there, into attachments."""
    of = [(image.files[r.file].inode, r) for r in image.regions if r.file >= 0 and _is_segment(image, r)]
    for segment in dict.fromkeys(number for number, _ in of):
        mine = sorted((r for number, r in of if number == segment), key=lambda r: (r.start - r.offset, r.start))
        for base, by in groupby(mine, lambda r: r.start - r.offset):
            regions = list(by)
            access = shm.SHM_REMAP
            if not any(r.prot & _PROT_WRITE for r in regions):
                access |= shm.SHM_RDONLY
            if any(r.prot & _PROT_EXEC for r in regions):
                access |= shm.SHM_EXEC
            calls.add(shm.SHMAT, segment, base, access, label=f"System V shared memory {segment}")
            for r in regions:
                calls.add("mprotect", r.start, r.end - r.start, r.prot)


def _is_segment(image: Image, region: Region) -> bool:
    file = image.files[region.file]
    return file.nameless and file.path.startswith(PREFIX.encode())
