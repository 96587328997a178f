"""Files that a process writes to together with its relatives, by one open file description: `(a & b &) > log`.

They share one offset, which two machines cannot. So where one of them leaves, what it writes goes through its ghost,
which has kept the description. Ends of a stream to a ghost that descendants share keep a process where it is.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

from engine.descriptors.model import Probe, Source, is_mode
from engine.linux.kcmp import same_file
from engine.linux.nsfs import pids_by_status
from engine.linux.procfs import children, own_file, parse_stat, read

_YOUNG = 0.5  # seconds: who forks all the time has such children, and between two of them it can move
_PATIENCE = 0.3  # seconds for these to end
_PAUSE = 0.002
_STREAMS = ("pipe:", "socket:", "/dev/pts/")
_MOST = 64  # relatives that are looked at; a shell's job has a handful


def writes_together(source: Source, probe: Probe) -> bool:
    """Whether a parent, sibling or child may write to the same open file at its one offset."""
    # Of any number: a shell that writes `echo > file` has put its own output aside meanwhile.
    if not is_mode(probe, stat.S_IFREG) or probe.access != os.O_WRONLY or probe.flags & os.O_APPEND:
        return False
    others = (one for one in _relatives(source.pid) if one not in source.kin)
    return any(_has(probe.pid or source.pid, probe, relative) for relative in islice(others, _MOST))


def kept_by_descendants(pid: int, externals: Iterable[Mapping[str, Any]]) -> list[str]:
    """Sentences about the ends of a stream to the ghost that a process on a node shares with descendants that stay."""
    links = {os.readlink(f"/proc/{pid}/fd/{one['fds'][0]}"): one["fds"][0] for one in externals}
    found = []
    for other in islice(_descendants(pid), _MOST) if links else ():
        with suppress(OSError, IndexError):  # it has just ended
            held = _links(other)
            name = pids_by_status(other)[-1]  # its own namespace's number, the cluster's
            found += [f"process {name}, which stays, has its fd {links[one]}, too" for one in links if one in held]
    return found


def outlast(pid: int) -> None:
    """Waits, a moment at most, for young descendants of a stopped process that have ends of a stream together with it:
    mostly they have ended then."""
    deadline = time.monotonic() + _PATIENCE
    while any(_is_young(other) and _shares_stream(pid, other) for other in islice(_descendants(pid), _MOST)):
        if time.monotonic() > deadline:
            return
        time.sleep(_PAUSE)


def _is_young(pid: int) -> bool:
    with suppress(OSError):
        seen = parse_stat(read(own_file(pid, "stat")))
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - seen.starttime / os.sysconf("SC_CLK_TCK")
        return seen.state not in "ZX" and age < _YOUNG + _PATIENCE
    return False


def _shares_stream(pid: int, other: int) -> bool:
    with suppress(OSError):
        common = _links(pid) & _links(other)
        return any(link.startswith(_STREAMS) for link in common)
    return False


def _links(pid: int) -> set[str]:
    folder = f"/proc/{pid}/fd/"
    return {os.readlink(folder + number) for number in os.listdir(folder)}


def _descendants(pid: int) -> Iterator[int]:
    left = [pid]
    while left:
        for child in children(left.pop()):
            yield child
            left.append(child)


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
        parent = parse_stat(read(own_file(pid, "stat"))).ppid
        if parent > 1:  # init's children have nothing in common
            yield parent
            yield from (sibling for sibling in children(parent) if sibling != pid)
