"""Figures of this machine or node, for `nodes/N/load` and its neighbours: proc_loadavg(5), proc_meminfo(5),
proc_uptime(5).

A look costs one read of an open file. A sample is worth sending when the load has changed by more than people care
for, or when anything has and the last one is old: so a node at rest sends nothing but heartbeats.
"""

from __future__ import annotations

import os
import time

from bpfs.wire.messages import Sample

LOOK_EVERY = 2.0
"""Seconds between looks; the kernel itself counts the load anew every 5 s (LOAD_FREQ)."""

FULL_EVERY = 15.0
"""Seconds after which any change at all is worth a message."""

LOAD_STEP, LOAD_SHARE = 0.05, 0.03
"""By how much, or by which share of itself, a figure of the load must have changed to be worth a message at once."""

MEMORY_STEP = 1024
"""kB by which a figure of memory must have changed to be a change."""

MEMORY_KEYS = ("MemTotal", "MemFree", "MemAvailable", "Buffers", "Cached", "SwapTotal", "SwapFree")


class Sampler:
    """Takes samples and knows which are worth sending."""

    def __init__(self) -> None:
        self._load = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
        self._meminfo = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)
        self._last: Sample | None = None
        self._full = 0.0

    def take(self) -> Sample:
        """A whole sample now."""
        self._full = time.monotonic()
        self._last = Sample(
            load=os.pread(self._load, 256, 0).decode().strip(),
            memory=self._memory(),
            cpus=len(os.sched_getaffinity(0)),
            uptime=round(time.clock_gettime(time.CLOCK_BOOTTIME), 2),
            kernel=os.uname().release,
        )
        return self._last

    def take_changed(self) -> Sample | None:
        """A sample where it differs from the last one by more than noise, else None."""
        last = self._last
        if last is None:
            return self.take()
        load = os.pread(self._load, 256, 0).decode().strip()
        urgent = any(_differ(a, b) for a, b in zip(_figures(load), _figures(last.load), strict=True))
        if not urgent and time.monotonic() - self._full < FULL_EVERY:
            return None
        new = self.take()
        near = all(abs(a[1] - b[1]) < MEMORY_STEP for a, b in zip(new.memory, last.memory, strict=True))
        if near and new.cpus == last.cpus and _figures(load) == _figures(last.load):
            self._last = last
            return None
        return new

    def _memory(self) -> tuple[tuple[str, int], ...]:
        found = dict.fromkeys(MEMORY_KEYS, 0)
        for line in os.pread(self._meminfo, 8192, 0).decode().splitlines():
            key, _, value = line.partition(":")
            if key in found:
                found[key] = int(value.split()[0])
        return tuple(found.items())

    def close(self) -> None:
        """Give the open files back."""
        os.close(self._load)
        os.close(self._meminfo)


def _figures(load: str) -> list[float]:
    # The other two words (processes, last pid) change all the time.
    return [float(word) for word in load.split()[:3]]


def _differ(new: float, old: float) -> bool:
    return abs(new - old) > max(LOAD_STEP, LOAD_SHARE * old)
