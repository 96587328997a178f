# SPDX-License-Identifier: GPL-2.0-or-later
"""One program for many nodes: what leaves the master, and how long it takes, by how many each node passes it on to.

A real master with simulated slaves that have one link together: that of a node with a network namespace of its own.
Images that go from slave to slave stay beyond it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from tests.benchmarks.bench_idle import cpu, family
from tests.benchmarks.bench_thousand import NODES, start_on, up
from tests.benchmarks.frame import Row
from tests.cluster.links import limited, sent
from tests.cluster.virtual import VirtualCluster, cluster, wait_until
from tests.nodes.simjobs import MORE, slaves

COUNT = NODES - 1 - MORE
ROUNDS = 3
SPEEDS = ("", "1gbit", "100mbit")
FANOUTS = ("off", "2", "4", "8", "16", "32", "64")


def measure(it: VirtualCluster, count: int) -> tuple[float, float, float]:
    """Seconds of a batch, bytes that went over the link, and seconds of the master's and its helpers' time."""
    master = family(it.pid("master"), frozenset([it.pid("n0")]))
    before, spent = sent(it, 0), cpu(master)
    taken = start_on(it, count)
    return taken, sent(it, 0) - before, cpu(master) - spent


def rows() -> Iterator[Row]:
    """The table: the least of some."""
    base: dict[str, tuple[float, ...]] = {}
    for fanout in FANOUTS:
        with (
            tempfile.TemporaryDirectory(prefix="bench-") as name,
            cluster(Path(name) / "m", "--netns", "--config", f"imagetree {fanout}", nodes=1) as it,
            slaves(it, COUNT, beside=0),
        ):
            wait_until(lambda it=it: up(it) == COUNT + 1 + MORE, "all nodes are up")
            for speed in SPEEDS:
                with limited(it, 0, speed) if speed else nullcontext():
                    found = [measure(it, COUNT) for _ in range(ROUNDS)]
                taken, carried, spent = (min(each) for each in zip(*found, strict=True))
                first = base.setdefault(speed, (taken, carried, spent))
                where = f"{COUNT} nodes, {speed or 'veth'}, imagetree {fanout}"
                yield Row(f"{where}: bpsh true", taken, "s", first[0], "off")
                yield Row("… bytes that leave the master", carried / 1e6, "MB", first[1] / 1e6, "off")
                yield Row("… its processor time", spent, "s", first[2], "off")
