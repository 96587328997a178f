"""flock(2), fcntl(2) locks: taken again inside the process, since two of the three kinds belong to it.

Where source and destination share a kernel, the source holds them until it is gone, and a ghost goes on holding them in
its process's stead: then they cannot be taken, and need not be. So these rows run as late as possible, may fail, and
failing is no error.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from engine.descriptors.model import Entry, Probe, Refusal, Row

_FLOCK, _FCNTL = 73, 72  # system-call numbers
_LOCK_SH, _LOCK_EX, _LOCK_NB = 1, 2, 4
_F_SETLK, _F_OFD_SETLK = 6, 37
_F_RDLCK, _F_WRLCK = 0, 1


def dump(probe: Probe) -> list[list[object]]:
    """The locks on a description, as `of_info` gives them.

    Raises:
        Refusal: a lease or a kind of lock that we do not know.
    """
    found = of_info(probe.info)
    for kind, *_ in found:
        if kind not in ("FLOCK", "POSIX", "OFDLCK"):
            raise Refusal(f"has a {str(kind).lower()} on {os.fsdecode(probe.link)}")
    return found


def of_info(info: bytes) -> list[list[object]]:
    """[kind, exclusive, start, length] of each lock, from lines of a fdinfo file like

    `lock:  1: POSIX  ADVISORY  WRITE 4711 fe:00:12345 0 EOF`.
    """
    found: list[list[object]] = []
    for line in info.split(b"\nlock:")[1:]:
        words = line.split(b"\n", 1)[0].split()
        kind, mode, start, end = words[1], words[3], int(words[6]), words[7]
        length = 0 if end == b"EOF" else int(end) - start + 1
        found.append([kind.decode(), mode == b"WRITE", start, length])
    return found


def rows(entry: Entry) -> Iterator[Row]:
    """The calls that take an entry's locks."""
    fd = entry["fds"][0][0]
    for kind, exclusive, start, length in entry.get("locks", ()):
        label = f"lock of descriptor {fd}"
        if kind == "FLOCK":
            yield Row(_FLOCK, (fd, (_LOCK_EX if exclusive else _LOCK_SH) | _LOCK_NB), False, label)
        else:
            spec = struct.pack("=hh4xqqi4x", _F_WRLCK if exclusive else _F_RDLCK, os.SEEK_SET, start, length, 0)
            yield Row(_FCNTL, (fd, _F_OFD_SETLK if kind == "OFDLCK" else _F_SETLK, spec), False, label)
