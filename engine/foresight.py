"""What /proc/PID/smaps said of a process before it stood still.

Nothing else tells the advice and the locks of its mappings (PROCMAP_QUERY knows protections only), and reading it goes
through all page tables: 3 to 7 ms a GB. So what it said a moment ago counts for now, where maps has not changed since;
it is read once more beside all the other work, and looked at before anything is sent.
"""

import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from engine.freeze import Frozen
from engine.linux import procfs

# A mapping's first line, and those of the others that do not just count pages.
_SAID: Final = re.compile(rb"^(?:[0-9a-f]+-[0-9a-f]+ |KernelPageSize:|ProtectionKey:|VmFlags:).*", re.MULTILINE)


def still_said(frozen: Frozen, smaps: bytes) -> bytes:
    """What smaps said a moment ago, where the mappings are the same now, and as much of them is locked; else nothing.

    Advice for a whole mapping, given in that moment, is all that could be missed: for a part of one, it makes it two.
    """
    before = procfs.parse_smaps(smaps)
    now = procfs.parse_maps(procfs.read(f"{frozen.live}/maps"))
    scratch = _scratch(frozen)
    same = [replace(vma, flags=frozenset()) for vma in before] == [vma for vma in now if vma.start != scratch]
    locked = sum(vma.end - vma.start for vma in before if "lo" in vma.flags)
    return smaps if same and locked == int(frozen.status.get("VmLck", "0 kB").split()[0]) << 10 else b""


class Recheck:
    """A second look at smaps of a process that stands still, beside what is done with the first."""

    def __init__(self, frozen: Frozen, before: bytes) -> None:
        self._frozen, self._before = frozen, before
        helper = ThreadPoolExecutor(1)
        self._now: Future[bytes] = helper.submit(procfs.read, f"{frozen.live}/smaps")
        helper.shutdown(wait=False)

    def agrees(self) -> bool:
        """Whether it says the same; waits for that. Raises OSError."""
        scratch = _scratch(self._frozen)
        return _said(self._before, scratch) == _said(self._now.result(), scratch)


def _scratch(frozen: Frozen) -> int:
    return frozen.injection.base if frozen.injection else 0


def _said(smaps: bytes, scratch: int) -> list[bytes]:
    """All but the numbers of pages, and but our own scratch."""
    lines = []
    ours = False
    for line in _SAID.findall(smaps):
        if line[:1] in b"0123456789abcdef":
            ours = scratch != 0 and int(line.split(b"-", 1)[0], 16) == scratch
        if not ours:
            lines.append(line)
    return lines
