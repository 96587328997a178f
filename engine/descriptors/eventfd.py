"""eventfd(2): a count and whether it is a semaphore."""

from __future__ import annotations

import os

from engine.descriptors.model import Entry, Kind, Probe, Source, Target


def _matches(_: Source, probe: Probe) -> bool:
    return probe.link == b"anon_inode:[eventfd]"


def _dump(_: Source, probe: Probe) -> Entry:
    # The count is hexadecimal; kernels before 6.5 do not tell semaphores apart.
    count = int(probe.field(b"eventfd-count"), 16)
    return probe.entry("eventfd", count=count, semaphore=probe.field(b"eventfd-semaphore") == b"1")


def _build(_: Target, entry: Entry) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | (os.EFD_SEMAPHORE if entry["semaphore"] else 0))
    if entry["count"]:
        os.eventfd_write(fd, entry["count"])
    return fd


KINDS = (Kind("eventfd", _matches, _dump, _build),)
