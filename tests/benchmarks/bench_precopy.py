# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves of processes that go on writing 10 MB/s: with their memory sent ahead, and without."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.frame import Row
from tests.benchmarks.subject import MB, Subject, last_move, stage
from tests.cluster.virtual import VirtualCluster

PAGES = 2560  # a second: 10 MB/s
SIZE = 1024 * MB
SIZES = (4, 8, 16, 32, 64, 128)  # MB: from where on is it worth while?
JOURNEY = (0, 1, -1)
ROUNDS = 2
REST_S = 1.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How a writer got on for a time."""

    a_second: float  # pages
    ns: float  # a page
    longest_ms: float  # between two turns


class Writer(Subject):
    """A running `dirty`."""

    def pace(self) -> Pace:
        """How it got on since the last time."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"?")
        pages, took, lasted, longest = (int(word) for word in self.line().split())
        return Pace(pages / lasted * 1e9, took / max(pages, 1), longest / 1e6)


def writer(it: VirtualCluster, program: Path, size: int) -> AbstractContextManager[Writer]:
    """A writer with `size` bytes, ready."""
    return Writer.running(it, program, str(size), str(PAGES))


@dataclass(slots=True)
class Journey:
    """What the moves of one process cost."""

    freezes: list[float]
    totals: list[float]
    resting: list[Pace]
    moving: list[Pace]


def journey(it: VirtualCluster, program: Path, size: int, rest: float = 0.0) -> Journey:
    """There, on and home."""
    found = Journey([], [], [], [])
    with writer(it, program, size) as one:
        for node in JOURNEY * ROUNDS:
            one.pace()
            time.sleep(rest)
            found.resting.append(one.pace())
            one.move(node)
            found.moving.append(one.pace())
            figures = last_move(it, node)
            found.freezes.append(figures["freeze_ms"])
            found.totals.append(figures["total_ms"])
    return found


def median(values: list[float]) -> float:
    """The median."""
    return sorted(values)[len(values) // 2]


def rows() -> Iterator[Row]:
    """The table."""
    small: dict[tuple[str, int], Journey] = {}
    large: dict[str, Journey] = {}
    for how in ("off", "1M"):
        with stage(2, "--precopy", how) as (it, folder):
            program = folder / "dirty"
            source = Path(__file__).with_name("dirty.c")
            subprocess.run(["cc", "-O2", "-Wall", "-o", program, source], check=True)
            for size in SIZES:
                small[how, size] = journey(it, program, size * MB)
            large[how] = journey(it, program, SIZE, REST_S)
    for size in SIZES:
        ahead, whole = small["1M", size], small["off", size]
        yield Row(f"{size} MB: frozen, median", median(ahead.freezes), "ms", median(whole.freezes), "without pre-copy")
        yield Row(f"{size} MB: whole move, median", median(ahead.totals), "ms", median(whole.totals), "without")
    ahead, whole = large["1M"], large["off"]
    yield Row("1 GB: frozen, least", min(ahead.freezes), "ms", min(whole.freezes), "without")
    yield Row("1 GB: frozen, median", median(ahead.freezes), "ms", median(whole.freezes), "without")
    longest, before = [pace.longest_ms for pace in ahead.moving], [pace.longest_ms for pace in whole.moving]
    yield Row("1 GB: longest pause that it saw, median", median(longest), "ms", median(before), "without")
    yield Row("1 GB: whole move, median", median(ahead.totals), "ms", median(whole.totals), "without")
    rate, rest = [pace.a_second for pace in ahead.moving], [pace.a_second for pace in ahead.resting]
    yield Row("1 GB: pages written a second on the way", median(rate), "", median(rest), "at rest")
    took, at_rest = [pace.ns for pace in ahead.moving], [pace.ns for pace in ahead.resting]
    yield Row("1 GB: a page's write on the way, median", median(took), "ns", median(at_rest), "at rest")
