"""O_ASYNC (F_SETOWN, F_SETSIG): set inside the process, which is the owner."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator

from engine.descriptors.model import O_ASYNC, SETTABLE, Entry, Probe, Refusal, Row, Source

_FCNTL = 72  # system-call number
_F_SETSIG, _F_GETSIG, _F_SETOWN_EX, _F_GETOWN_EX = 10, 11, 15, 16
_F_OWNER_TID, _F_OWNER_PID, _F_OWNER_PGRP = 0, 1, 2


def dump(source: Source, probe: Probe) -> dict[str, object]:
    """`owner`: [type, signal] when the process asked for SIGIO.

    Raises:
        Refusal: the signals go to another process.
    """
    if not probe.flags & O_ASYNC:
        return {}
    fd = source.grab(probe)
    kind, pid = struct.unpack("=ii", fcntl.fcntl(fd, _F_GETOWN_EX, bytes(8)))
    own = ((_F_OWNER_PID, source.pid), (_F_OWNER_TID, source.pid), (_F_OWNER_PGRP, os.getpgid(source.pid)))
    if pid and (kind, pid) not in own:
        raise Refusal(f"sends its signals to process {pid}")
    return {"owner": [kind if pid else -1, fcntl.fcntl(fd, _F_GETSIG)]}


def rows(entry: Entry, pid: int, pgid: int) -> Iterator[Row]:
    """The calls that make the process the owner; ids as it sees them itself."""
    if "owner" not in entry:
        return
    kind, signal = entry["owner"]
    fd = entry["fds"][0][0]
    label = f"owner of descriptor {fd}"
    if kind >= 0:
        owner = struct.pack("=ii", kind, pgid if kind == _F_OWNER_PGRP else pid)
        yield Row(_FCNTL, (fd, _F_SETOWN_EX, owner), True, label)
    yield Row(_FCNTL, (fd, _F_SETSIG, signal), True, label)
    yield Row(_FCNTL, (fd, fcntl.F_SETFL, entry["flags"] & (SETTABLE | O_ASYNC)), True, label)
