# SPDX-License-Identifier: GPL-2.0-or-later
"""A real master with 1,024 nodes: one is a slave, the others are links that speak as slaves do, from another process.

They beat, tell figures, answer fences, come back, and tell of jobs that say a line and end, all by the real protocol.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.bench_idle import cpu, family, memory
from tests.benchmarks.bench_tree import read_all
from tests.benchmarks.frame import Row, seconds
from tests.cluster.virtual import TOP, VirtualCluster, cluster, wait_until
from tests.nodes.simjobs import MORE, slaves

NODES = 1024
REST = 10.0  # seconds
SETTLE = 3.0  # seconds after the last one is up that are not looked at


def command(it: VirtualCluster, name: str, *words: str) -> str:
    """What a command prints."""
    program = [str(TOP / "bpfs/bin/bpsh")] if name == "bpsh" else [sys.executable, "-m", f"bpfs.cli.{name}"]
    environment = {**os.environ, "BPFS": str(it.mount), "PYTHONPATH": str(TOP)}
    return subprocess.run([*program, *words], env=environment, capture_output=True, text=True, check=True).stdout


def start_on(it: VirtualCluster, count: int) -> float:
    """Seconds for a program on nodes 1 to `count`, all of which are simulated: each says a line."""
    bpsh, environment, start = str(TOP / "bpfs/bin/bpsh"), {**os.environ, "BPFS": str(it.mount)}, time.perf_counter()
    run = subprocess.run(
        [bpsh, "-n", f"1-{count}", "true"], env=environment, capture_output=True, text=True, check=False
    )
    taken = time.perf_counter() - start
    assert (run.stdout.count("\n"), run.stderr) == (count, "")
    return taken


def up(it: VirtualCluster) -> int:
    """How many nodes are up."""
    return it.read("status").count(" up ")


def rows() -> Iterator[Row]:
    """The table."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name, cluster(Path(name) / "m", nodes=1) as it:
        start = time.perf_counter()
        with slaves(it, NODES - 1 - MORE):
            wait_until(lambda: up(it) == NODES, "all nodes are up")
            yield Row(f"{NODES} nodes join, from nothing", time.perf_counter() - start, "s")
            time.sleep(SETTLE)
            yield from resting(it)
            yield from reading(it)
            yield from starting(it)
            yield from changing(it)


def resting(it: VirtualCluster) -> Iterator[Row]:
    """The master's processor and memory, with everybody's heartbeats."""
    master = family(it.pid("master"), frozenset([it.pid("n0")]))
    before, start = cpu(master), time.perf_counter()
    time.sleep(REST)
    yield Row("the master at rest, of a core", (cpu(master) - before) / (time.perf_counter() - start) * 100, "%")
    yield Row("... memory (PSS), with all helpers", memory(master)[0], "MB")


def reading(it: VirtualCluster) -> Iterator[Row]:
    """Who asks for all of them."""
    python = seconds(lambda: subprocess.run([sys.executable, "-c", "import argparse, json"], check=True)) * 1e3
    for words in (("bpstat",), ("bpstat", "-l"), ("bpstat", "--json"), ("bpstat", "-n", "0-1000,!down")):
        taken = seconds(lambda words=words: command(it, *words)) * 1e3
        yield Row(" ".join(words), taken, "ms", python, "python3 -c 'import argparse, json'")
    yield Row("bpsh --expand allup", seconds(lambda: command(it, "bpsh", "--expand", "allup")) * 1e3, "ms")
    for name in ("state", "load", "busy"):
        paths = [f"{it.mount}/nodes/{number}/{name}" for number in range(NODES)]
        yield Row(f"all nodes/N/{name}, one after the other", seconds(lambda paths=paths: read_all(paths)) * 1e3, "ms")


def starting(it: VirtualCluster) -> Iterator[Row]:
    """A program for all of them: what the master's side of it takes, for the nodes have nothing to do."""
    master = family(it.pid("master"), frozenset([it.pid("n0")]))
    for count in (64, NODES - 1 - MORE):
        before = cpu(master)
        yield Row(f"bpsh 1-{count} true", start_on(it, count), "s")
        yield Row("... the master's processor time a node", (cpu(master) - before) / count * 1e3, "ms")


def changing(it: VirtualCluster) -> Iterator[Row]:
    """Who changes all of them, by bpctl, until that shows."""
    for mode in ("110", "111"):
        start = time.perf_counter()
        command(it, "bpctl", "-S", "all", "-m", mode)
        yield Row(f"bpctl -S all -m {mode}", (time.perf_counter() - start) * 1e3, "ms")
    start = time.perf_counter()
    command(it, "bpctl", "-S", "1-", "-s", "unavailable")
    yield Row("bpctl -S 1- -s unavailable", (time.perf_counter() - start) * 1e3, "ms")
    command(it, "bpctl", "-S", "1-", "-s", "up")
    start = time.perf_counter()
    command(it, "bpctl", "-S", "1-", "-R")
    wait_until(lambda: up(it) == NODES, "all nodes are back")
    yield Row("bpctl -S 1- -R, until all are up again", time.perf_counter() - start, "s")
