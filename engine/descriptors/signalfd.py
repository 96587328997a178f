"""signalfd(2): a set of signals; whose signals they are depends on who reads."""

from __future__ import annotations

from engine.descriptors.model import Entry, Kind, Probe, Source, Target
from engine.linux import signalfd


def _matches(_: Source, probe: Probe) -> bool:
    return probe.link == b"anon_inode:[signalfd]"


def _dump(_: Source, probe: Probe) -> Entry:
    return probe.entry("signalfd", mask=int(probe.field(b"sigmask"), 16))


def _build(_: Target, entry: Entry) -> int:
    return signalfd.create(entry["mask"])


KINDS = (Kind("signalfd", _matches, _dump, _build),)
