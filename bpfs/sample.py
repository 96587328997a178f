"""Figures of this machine or node, for `nodes/N/load` and its neighbours: proc_loadavg(5), proc_meminfo(5),
proc_uptime(5).

Taking a look costs one read of an open file; the rest is read only where the load has changed, or the last full
look is `FULL_EVERY` old.
"""

from __future__ import annotations

import os
import time

from bpfs.wire.messages import Sample

LOOK_EVERY = 2.0
"""Seconds between looks; the kernel itself counts the load anew every 5 s (LOAD_FREQ)."""

FULL_EVERY = 10.0
"""Seconds after which memory is looked at although the load is the same."""

MEMORY_STEP = 1024
"""kB by which a figure of memory must have changed to be worth a message."""

MEMORY_KEYS = ("MemTotal", "MemFree", "MemAvailable", "Buffers", "Cached", "SwapTotal", "SwapFree")


class Sampler:
    """Takes samples and knows which are worth sending."""

    def __init__(self) -> None:
        self._load = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
        self._meminfo = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)
        self._boot = time.clock_gettime(time.CLOCK_BOOTTIME)
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
        # The other two words (processes, last pid) change all the time.
        same = load.split()[:3] == last.load.split()[:3]
        if same and time.monotonic() - self._full < FULL_EVERY:
            return None
        new = self.take()
        near = all(abs(a[1] - b[1]) < MEMORY_STEP for a, b in zip(new.memory, last.memory, strict=True))
        if same and near and new.cpus == last.cpus:
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
