# SPDX-License-Identifier: GPL-2.0-or-later
"""A real master with 1,024 nodes: one is a slave, the others are links that speak as slaves do, from another process.

They beat, tell figures, answer fences and come back, all by the real protocol; they hold no jobs.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from bpfs.errors import LinkClosed
from bpfs.wire.handshake import read_key
from bpfs.wire.messages import ClockIs, Names, ReadClock, SetClock, SlewClock
from tests.benchmarks.bench_idle import cpu, family, memory
from tests.benchmarks.bench_tree import read_all
from tests.benchmarks.frame import Row, seconds
from tests.cluster.virtual import TOP, VirtualCluster, cluster, wait_until
from tests.nodes.simslave import SAMPLE, SimulatedSlave

NODES = 1024
REST = 10.0  # seconds
SETTLE = 3.0  # seconds after the last one is up that are not looked at


ANSWERS = {
    Names: lambda _: None,
    ReadClock: lambda _: ClockIs(time.time_ns()),
    SlewClock: lambda _: None,
    SetClock: lambda _: None,
}


def _be_slaves(port: int, key: Path) -> None:
    secret = read_key(key)

    async def one(number: int) -> None:
        while True:
            slave = SimulatedSlave(port, number=number, key=secret, handlers=ANSWERS)
            try:
                await slave.run(SAMPLE)
            except (LinkClosed, OSError):
                pass  # the master has ended, or refuses for now
            await trio.sleep(0.5)

    async def all_of_them() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(1, NODES):
                nursery.start_soon(one, number)

    trio.run(all_of_them)


@contextmanager
def slaves(it: VirtualCluster) -> Iterator[None]:
    """The simulated ones, until the context ends."""
    port = int((it.rundir.path / "port").read_text().split()[1])
    process = multiprocessing.get_context("spawn").Process(target=_be_slaves, args=(port, it.rundir.key), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def command(it: VirtualCluster, name: str, *words: str) -> str:
    """What a command prints."""
    program = [str(TOP / "bpfs/bin/bpsh")] if name == "bpsh" else [sys.executable, "-m", f"bpfs.cli.{name}"]
    environment = {**os.environ, "BPFS": str(it.mount), "PYTHONPATH": str(TOP)}
    return subprocess.run([*program, *words], env=environment, capture_output=True, text=True, check=True).stdout


def up(it: VirtualCluster) -> int:
    """How many nodes are up."""
    return it.read("status").count(" up ")


def rows() -> Iterator[Row]:
    """The table."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name, cluster(Path(name) / "m", nodes=1) as it:
        start = time.perf_counter()
        with slaves(it):
            wait_until(lambda: up(it) == NODES, "all nodes are up")
            yield Row(f"{NODES} nodes join, from nothing", time.perf_counter() - start, "s")
            time.sleep(SETTLE)
            yield from resting(it)
            yield from reading(it)
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
