"""Files that a process writes to together with its relatives, by one open file description: `(a & b &) > log`.

They share one offset, which two machines cannot. So where one of them leaves, what it writes goes through its ghost,
which has kept the description.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

from engine.descriptors.model import Probe, Source, is_mode
from engine.linux.kcmp import same_file
from engine.linux.procfs import children, parse_stat, read

_MOST = 64  # relatives that are looked at; a shell's job has a handful


def writes_together(source: Source, probe: Probe) -> bool:
    """Whether a parent, sibling or child may write to the same open file at its one offset."""
    # Of any number: a shell that writes `echo > file` has put its own output aside meanwhile.
    if not is_mode(probe, stat.S_IFREG) or probe.access != os.O_WRONLY or probe.flags & os.O_APPEND:
        return False
    return any(_has(source.pid, probe, relative) for relative in islice(_relatives(source.pid), _MOST))


def _has(pid: int, probe: Probe, relative: int) -> bool:
    folder = b"/proc/%d/fd/" % relative
    with suppress(OSError):  # it has just ended
        for number in os.listdir(folder):
            with suppress(OSError):  # closed meanwhile
                if os.readlink(folder + number) == probe.link and same_file(pid, probe.fd, int(number), relative):
                    return True
    return False


def _relatives(pid: int) -> Iterator[int]:
    yield from children(pid)
    with suppress(OSError):
        parent = parse_stat(read(f"/proc/{pid}/stat")).ppid
        if parent > 1:  # init's children have nothing in common
            yield parent
            yield from (sibling for sibling in children(parent) if sibling != pid)
