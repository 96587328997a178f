# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves that run before their memory is there (`PID lazy`), beside plain ones of the same process."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.bench_precopy import Journey, Writer, median, writer
from tests.benchmarks.frame import Row
from tests.benchmarks.subject import MB, last_move, stage
from tests.cluster.virtual import VirtualCluster

SIZES = {1: 8, 100: 6, 1024: 2}  # MB, and rounds: there, on and home
JOURNEY = (0, 1, -1)


def rows() -> Iterator[Row]:
    """The table."""
    with stage(2, "--precopy", "off") as (it, folder):
        program = folder / "dirty"
        source = Path(__file__).with_name("dirty.c")
        subprocess.run(["cc", "-O2", "-Wall", "-o", program, source], check=True)
        for size, rounds in SIZES.items():
            lazy, plain = Journey([], [], [], []), Journey([], [], [], [])
            with writer(it, program, size * MB) as one:
                for node in JOURNEY * rounds:
                    for how, found in ((" lazy", lazy), ("", plain)):
                        _move(it, one, node, how, found)
                        _move(it, one, -1 if node != -1 else 1, "", None)  # back, that the two go the same way
            what = f"{size} MB: "
            yield Row(what + "frozen, least", min(lazy.freezes), "ms", min(plain.freezes), "plain")
            yield Row(what + "frozen, median", median(lazy.freezes), "ms", median(plain.freezes), "plain")
            longest, before = ([pace.longest_ms for pace in found.moving] for found in (lazy, plain))
            yield Row(what + "longest pause that it saw, median", median(longest), "ms", median(before), "plain")
            yield Row(what + "until all is there, median", median(lazy.totals), "ms", median(plain.totals), "plain")


def _move(it: VirtualCluster, one: Writer, node: int, how: str, found: Journey | None) -> None:
    one.pace()
    start = time.perf_counter()
    it.write(f"nodes/{node}/migrate", f"{one.pid}{how}\n")
    while "to come" in it.read(f"procs/{one.pid}/state"):
        time.sleep(0.01)
    if found is not None:
        found.totals.append((time.perf_counter() - start) * 1e3)
        found.freezes.append(last_move(it, node)["freeze_ms"])
        found.moving.append(one.pace())
