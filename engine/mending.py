"""Mappings in several pieces, made one.

Neighbours of the same kind that have pages of their own are not merged by the kernel, not even when the gap between
them is filled (is_mergeable_anon_vma of mm/vma.c). Memory that came ahead of its process may end so; but what is one
mapping where it comes from has to be one here: mremap(2) fails on two.
"""

from collections.abc import Iterable
from typing import Final

from engine import memory
from engine.freeze import find_hole
from engine.linux import pagemap, procfs
from engine.runner import Calls, Injection

_READ_WRITE: Final = 3
_MAP_FIXED_NOREPLACE: Final = 0x100000
_MREMAP_MOVE_FIXED: Final = 3
_FAR: Final = 0x100000000  # lowest address of where the new one is filled

Region = tuple[int, int, int]
"""Start, end and MAP_* flags of plain memory that may be read and written."""


def mend(injection: Injection, regions: Iterable[Region]) -> int:
    """Make each of these regions of a stopped process one mapping, with what is in it.

    Returns:
        How many had to be made anew.

    Raises:
        OSError: there is no room, or the process has ended.
    """
    vmas = procfs.parse_maps(procfs.read(f"/proc/{injection.pid}/maps"))
    spans = [(vma.start, vma.end) for vma in vmas]
    edges = {vma.start for vma in vmas}
    broken = [region for region in regions if any(region[0] < edge < region[1] for edge in edges)]
    for start, end, flags in broken:
        hole = find_hole(spans, end - start, _FAR)
        calls = Calls(injection)
        calls.add("mmap", hole, end - start, _READ_WRITE, flags | _MAP_FIXED_NOREPLACE, -1, 0, label="mapping memory")
        calls.run()
        _copy(injection.pid, start, end, hole - start)
        calls = Calls(injection)
        calls.add("mremap", hole, end - start, end - start, _MREMAP_MOVE_FIXED, start, label="moving memory")
        calls.run()
    return len(broken)


def _copy(pid: int, start: int, end: int, by: int) -> None:
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as table:
        try:
            found = pagemap.private_runs(table.fileno(), start, end)
        except pagemap.NoScan:
            found = pagemap.private_entries(table.fileno(), start, end)
    for group, size in memory.groups(found):
        memory.copy(pid, group, [(address + by, length) for address, length in group], size)
