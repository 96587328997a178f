"""timerfd_create(2): the time that is left, or for the wall clock the time that it stands for."""

from __future__ import annotations

import time

from engine.descriptors.model import Entry, Kind, Probe, Source, Target
from engine.linux import timerfd

_WALL_CLOCKS = (time.CLOCK_REALTIME, 8)  # 8: CLOCK_REALTIME_ALARM


def _matches(_: Source, probe: Probe) -> bool:
    return probe.link == b"anon_inode:[timerfd]"


def _ns(text: bytes) -> int:
    seconds, nanoseconds = text.strip(b"()").split(b",")
    return int(seconds) * 10**9 + int(nanoseconds)


def _dump(_: Source, probe: Probe) -> Entry:
    clock, flags = int(probe.field(b"clockid")), int(probe.field(b"settime flags"), 8)
    value, interval = _ns(probe.field(b"it_value")), _ns(probe.field(b"it_interval"))
    absolute = bool(value and clock in _WALL_CLOCKS and flags & timerfd.TFD_TIMER_ABSTIME)
    return probe.entry(
        "timerfd", clock=clock, value=value + time.time_ns() if absolute else value, interval=interval,
        settime=flags if absolute else 0, ticks=int(probe.field(b"ticks")),
    )  # fmt: skip


def _build(_: Target, entry: Entry) -> int:
    fd = timerfd.create(entry["clock"])
    value, ticks = entry["value"], entry["ticks"]
    if not value and entry["interval"] and ticks:
        # It went off and waits for its reader before it starts the next round (fs/timerfd.c): have it go off at once.
        value, ticks = 1, 0
    if value:
        timerfd.arm(fd, entry["settime"], value, entry["interval"])
    if ticks:
        timerfd.set_ticks(fd, ticks)
    return fd


KINDS = (Kind("timerfd", _matches, _dump, _build),)
