"""Figures of this machine or node, for `nodes/N/load` and its neighbours: proc_loadavg(5), proc_meminfo(5),
proc_uptime(5), proc_stat(5).

A look costs two reads of open files. A sample is worth sending when the load or what a processor does has changed by
more than people care for, or when anything has and the last one is old: so a node at rest sends nothing but heartbeats.
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

BUSY_STEP, BUSY_NOISE = 0.25, 0.1
"""By how much what a processor is busy must have changed to be worth a message at once, and to be a change."""

BUSY_OVER = 1.0
"""Least seconds over which it is told how busy a processor is: a tick is 10 ms."""

IDLE_FIELDS = (4, 5)
"""Places of idle and iowait in a `cpuN` line of /proc/stat, its number being the first."""

MEMORY_KEYS = ("MemTotal", "MemFree", "MemAvailable", "Buffers", "Cached", "Shmem", "SwapTotal", "SwapFree")

COUNTERS = ("ctxt", "btime", "processes", "procs_running", "procs_blocked")
"""Lines of /proc/stat that have one number each."""

TICKS = 8
"""Columns of a `cpuN` line that do not overlap: time of guests, behind them, is in `user` and `nice` already."""

Ticks = tuple[tuple[int, ...], ...]


class Processors:
    """What the processors that this process may use have done, and how busy they have been of late."""

    def __init__(self) -> None:
        self._stat = os.open("/proc/stat", os.O_RDONLY | os.O_CLOEXEC)
        self.ticks: Ticks = ()
        self.busy: tuple[float, ...] = ()
        self.counters: tuple[tuple[str, int], ...] = ()
        self._since: tuple[float, Ticks] = (0.0, ())

    def look(self) -> None:
        """Read the counters anew. The first time, `busy` is that of the whole time since the machine started."""
        lines = {words[0]: words[1:] for words in map(str.split, self._text().splitlines()) if words}
        mine = (f"cpu{number}" for number in sorted(os.sched_getaffinity(0)))
        self.ticks = tuple((int(cpu[3:]), *map(int, lines[cpu])) for cpu in mine if cpu in lines)
        self.counters = tuple((key, int(lines[key][0])) for key in COUNTERS if key in lines)
        now, (then, before) = time.monotonic(), self._since
        if now - then >= BUSY_OVER or len(before) != len(self.ticks):
            old = {ticks[0]: ticks for ticks in before}
            self.busy = tuple(_busy(ticks, old.get(ticks[0])) for ticks in self.ticks)
            self._since = (now, self.ticks)

    def _text(self) -> str:
        # The kernel makes all of it for the first byte that is read, and gives no more than it has made at once.
        text = b""
        while part := os.pread(self._stat, 1 << 16, len(text)):
            text += part
        return text.decode()

    def close(self) -> None:
        """Give the open file back."""
        os.close(self._stat)


def _busy(ticks: tuple[int, ...], before: tuple[int, ...] | None) -> float:
    own = slice(1, 1 + TICKS)
    passed = [new - old for new, old in zip(ticks[own], before[own] if before else [0] * TICKS, strict=True)]
    # The kernel's count of idle time may go back by some ticks.
    whole, idle = sum(passed), sum(passed[place - 1] for place in IDLE_FIELDS)
    return round(min(max(1 - idle / whole, 0.0), 1.0), 2) if whole > 0 else 0.0


def _clock() -> float:
    """MHz of the first processor, 0 where the kernel does not say. Not asked for often: each line is a measurement."""
    with open("/proc/cpuinfo", "rb", buffering=0) as file:
        for line in file.read(4096).decode(errors="replace").splitlines():
            if line.startswith("cpu MHz"):
                return float(line.partition(":")[2])
    return 0.0


class Sampler:
    """Takes samples and knows which are worth sending."""

    def __init__(self) -> None:
        self._load = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
        self._meminfo = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)
        self._processors = Processors()
        self._mhz = _clock()
        self._last: Sample | None = None
        self._full = 0.0

    def take(self) -> Sample:
        """A whole sample now."""
        self._processors.look()
        return self._make()

    def _make(self) -> Sample:
        self._full = time.monotonic()
        self._last = Sample(
            load=os.pread(self._load, 256, 0).decode().strip(),
            memory=self._memory(),
            cpus=len(os.sched_getaffinity(0)),
            uptime=round(time.clock_gettime(time.CLOCK_BOOTTIME), 2),
            kernel=os.uname().release,
            mhz=self._mhz,
            processors=self._processors.ticks,
            busy=self._processors.busy,
            counters=self._processors.counters,
        )
        return self._last

    def take_changed(self) -> Sample | None:
        """A sample where it differs from the last one by more than noise, else None."""
        last = self._last
        if last is None:
            return self.take()
        load = os.pread(self._load, 256, 0).decode().strip()
        self._processors.look()
        urgent = any(_differ(a, b) for a, b in zip(_figures(load), _figures(last.load), strict=True))
        urgent |= not self._as_busy(last, BUSY_STEP)
        if not urgent and time.monotonic() - self._full < FULL_EVERY:
            return None
        new = self._make()
        near = all(abs(a[1] - b[1]) < MEMORY_STEP for a, b in zip(new.memory, last.memory, strict=True))
        near &= new.cpus == last.cpus and self._as_busy(last, BUSY_NOISE)
        if near and _figures(load) == _figures(last.load):
            self._last = last
            return None
        return new

    def _as_busy(self, last: Sample, step: float) -> bool:
        busy = self._processors.busy
        return len(busy) == len(last.busy) and all(abs(a - b) < step for a, b in zip(busy, last.busy, strict=True))

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
        self._processors.close()


def _figures(load: str) -> list[float]:
    # The other two words (processes, last pid) change all the time.
    return [float(word) for word in load.split()[:3]]


def _differ(new: float, old: float) -> bool:
    return abs(new - old) > max(LOAD_STEP, LOAD_SHARE * old)
