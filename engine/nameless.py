"""Shared memory without a file that has a name: memfds, deleted files, anonymous memory that is mapped for sharing.

One object may be mapped in many places. Its pages travel once: with the descriptor, where the process has one on it,
else from the mappings. Pages that the process itself has never touched count as well, so what there is is asked of the
object (SEEK_DATA), not of the page tables.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from engine.descriptors import Placed
from engine.image import Image, MappedFile, Region
from engine.linux.procfs import Vma

_PAGE: Final = 4096
_PROT_WRITE: Final = 2
_MAP_SHARED: Final = 1
_NOT_OURS: Final = ("/SYSV", "/secretmem", "/[aio]")
_HUGE: Final = "/anon_hugepage (deleted)"
_UNNAMED: Final = ("/dev/zero (deleted)", "[anon_shmem:", _HUGE)
MAP_HUGETLB: Final = 0x40000
_MAP_HUGE_SHIFT: Final = 26


def is_nameless(vma: Vma) -> bool:
    """Whether a shared mapping is of such an object; System V segments and secret memory are not ours."""
    return vma.path.startswith((*_UNNAMED, "/memfd:")) or (vma.deleted and not vma.path.startswith(_NOT_OURS))


def is_plain(vma: Vma, every: Iterable[Vma]) -> bool:
    """Whether it is anonymous memory that is mapped in this one place: MAP_SHARED | MAP_ANONYMOUS makes it."""
    mapped = [other for other in every if other.inode == vma.inode and other.minor == vma.minor]
    return len(mapped) == 1 and vma.path.startswith(_UNNAMED)


def huge_flags(vma: Vma, every: Iterable[Vma], page_size: int) -> int | None:
    """The flags of mmap that make a mapping of huge pages, in bytes of its own size, anew.

    None where they have a name, or are an object that is mapped in several places.
    """
    if vma.path != _HUGE or (vma.shared and not is_plain(vma, every)):
        return None
    return MAP_HUGETLB | (page_size.bit_length() - 1) << _MAP_HUGE_SHIFT


def is_huge(vma: Vma) -> bool:
    """Whether it is anonymous memory of huge pages."""
    return vma.path == _HUGE


def describe(pid: int, vma: Vma) -> MappedFile:
    """The object for the image."""
    info = os.stat(_link(pid, vma))
    name = os.fsencode(vma.path.removesuffix(" (deleted)"))
    return MappedFile(name, info.st_dev, info.st_ino, info.st_size, 0, True, True)


def open_object(pid: int, vma: Vma) -> int:
    """A descriptor of what is mapped, for reading. Raises OSError."""
    return os.open(_link(pid, vma), os.O_RDONLY | os.O_CLOEXEC)


def short_name(file: MappedFile) -> bytes:
    """A name for a memfd that takes its place."""
    return os.path.basename(file.path)[:200]


def _link(pid: int, vma: Vma) -> str:
    return f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}"


def runs(pid: int, vmas: Iterable[Vma]) -> Iterator[tuple[int, int]]:
    """(address, length) of the data of objects that no descriptor carries; each byte once. Raises OSError."""
    done: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for vma in vmas:
        seen = done.setdefault((vma.minor, vma.inode), [])
        span = (vma.offset, vma.offset + vma.end - vma.start)
        fd = open_object(pid, vma)
        try:
            there = list(data(fd, *span))
        finally:
            os.close(fd)
        for first, last in _without(there, seen):
            yield vma.start + first - vma.offset, last - first
        seen.append(span)


def data(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(first, last) of the pages of an object that are no holes."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # holes to the end
            raise
        hole = (os.lseek(fd, start, os.SEEK_HOLE) + _PAGE - 1) & -_PAGE
        if start < end:
            yield start & -_PAGE, min(hole, end)
        start = hole


def _without(spans: list[tuple[int, int]], seen: list[tuple[int, int]]) -> list[tuple[int, int]]:
    for first, last in seen:
        cut = []
        for start, end in spans:
            cut += [part for part in ((start, min(end, first)), (max(start, last), end)) if part[0] < part[1]]
        spans = cut
    return spans


# ---- the destination -------------------------------------------------------------------------------------


def is_object(image: Image, region: Region) -> bool:
    """Whether a region of an image is of such an object."""
    return bool(region.flags & _MAP_SHARED) and (region.file < 0 or image.files[region.file].nameless)


def widened(image: Image, region: Region) -> int:
    """The protection with which to map a region, so that its pages can be written.

    Those of private memory can in any case (/proc/PID/mem), unless they are huge.
    """
    return region.prot | _PROT_WRITE if is_object(image, region) or region.flags & MAP_HUGETLB else region.prot


def narrow(image: Image, protect: Callable[[int, int, int], Any]) -> None:
    """Take back what `widened` gave: `protect(address, length, prot)` for each."""
    for region in image.regions:
        if widened(image, region) != region.prot:
            protect(region.start, region.end - region.start, region.prot)


def make(image: Image, placed: Iterable[Placed], given: Mapping[tuple[int, int], int]) -> dict[int, int]:
    """Make the objects: index of a file of the image -> descriptor of this process; the caller's to close.

    Args:
        placed: the descriptors as rebuilt, which may be on the same objects.
        given: (device, inode) on the source -> descriptor of what the process shares with others that move with it.

    Raises:
        OSError: no memory, or a memfd is sealed against it.
    """
    local = {one.target_fd: one.local_fd for one in placed}
    known = {
        (entry["dev"], entry["ino"]): local[entry["fds"][0][0]]
        for entry in image.descriptors
        if entry["kind"] in ("memfd", "deleted")
    } | dict(given)
    made: dict[int, int] = {}
    try:
        for index, file in enumerate(image.files):
            if not file.nameless:
                continue
            if (fd := known.get((file.device, file.inode))) is not None:
                made[index] = _reopen(fd)
            else:
                made[index] = os.memfd_create(os.fsdecode(short_name(file)), os.MFD_CLOEXEC)
                os.ftruncate(made[index], file.size)
    except BaseException:
        for fd in made.values():
            os.close(fd)
        raise
    return made


def _reopen(fd: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:  # sealed, or on a file system that is read-only by now
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
