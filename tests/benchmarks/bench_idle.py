# SPDX-License-Identifier: GPL-2.0-or-later
"""A cluster of 64 nodes with nothing to do: the time until it is up, and what its daemons take."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tests.benchmarks.frame import Row
from tests.cluster.virtual import VirtualCluster, children, cluster

NODES = 64
REST = 10.0  # seconds
TICK = os.sysconf("SC_CLK_TCK")
SETTLE = 3.0  # seconds after `up` that are not looked at


def family(pid: int, apart: frozenset[int]) -> list[int]:
    """A process and what descends from it, without the other daemons."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        todo += [child for child in children(one) if child not in apart]
    return found


def cpu(pids: list[int]) -> float:
    """Seconds of processor time that these have used."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split() for pid in pids]
    return sum(int(one[11]) + int(one[12]) for one in fields) / TICK


def memory(pids: list[int]) -> tuple[float, float]:
    """Their PSS and RSS in MB."""
    total = {"Pss": 0, "Rss": 0}
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key in total:
                total[key] += int(rest.split()[0])
    return total["Pss"] / 1024, total["Rss"] / 1024


def rows() -> Iterator[Row]:
    """The table."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        start = time.perf_counter()
        with cluster(Path(name) / "bpfs", nodes=NODES) as it:
            yield Row(f"bpcluster up, {NODES} nodes", time.perf_counter() - start, "s")
            yield from resting(it)


def resting(it: VirtualCluster) -> Iterator[Row]:
    """Processor and memory."""
    roles = [f"n{number}" for number in range(NODES)]
    apart = frozenset(it.pid(role) for role in roles)
    master = family(it.pid("master"), apart)
    slaves = [family(it.pid(role), apart) for role in roles]
    all_slaves = list(chain.from_iterable(slaves))
    time.sleep(SETTLE)
    before, start = (cpu(master), cpu(all_slaves)), time.perf_counter()
    time.sleep(REST)
    after, passed = (cpu(master), cpu(all_slaves)), time.perf_counter() - start
    yield Row("the master at rest, of a core", (after[0] - before[0]) / passed * 100, "%")
    yield Row("a slave at rest, of a core, mean", (after[1] - before[1]) / passed * 100 / NODES, "%")
    note = "PSS, with all its helpers; compared with the sum of their RSS"
    yield Row("memory of the master", memory(master)[0], "MB", memory(master)[1], note)
    sizes = [memory(pids) for pids in slaves]
    middle = statistics.median(pss for pss, _ in sizes), statistics.median(rss for _, rss in sizes)
    yield Row("memory of a node, median", middle[0], "MB", middle[1], note)
    alone = memory([it.slave(0)])
    yield Row("memory of bpslave itself", alone[0], "MB", alone[1], "PSS, compared with RSS")
