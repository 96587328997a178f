# SPDX-License-Identifier: GPL-2.0-or-later
"""A real master with 1,000 slaves that are simulated, with 15 processes on each: it at rest, and who asks it.

The slaves speak the real protocol from another process. Their jobs are processes nowhere, but have ghosts on the
master. It wants a machine with few nodes of other clusters: there are 1,024 blocks of pids (bpfs/nodes/blocks.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks.bench_idle import cpu, family, memory
from tests.benchmarks.bench_thousand import up
from tests.benchmarks.bench_tree import list_all, read_all
from tests.benchmarks.frame import Row
from tests.cluster.virtual import TOP, VirtualCluster, children, cluster
from tests.nodes.simjobs import MORE, slaves

NODES = 1000
CHILDREN = 14  # of one job a node
REST = 10.0  # seconds
SETTLE = 3.0  # seconds after the last change that are not looked at
PATIENCE = 600.0  # seconds
ASKED = 1000  # processes whose files are read


def wait_for(what: Callable[[], object], sentence: str) -> None:
    """Until it is so."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, sentence
        time.sleep(0.2)


def rows() -> Iterator[Row]:
    """The table."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        cluster(Path(name) / "m", nodes=1) as it,
        slaves(it, NODES, forks=CHILDREN),
    ):
        wait_for(lambda: up(it) == NODES + 1 + MORE, "not all nodes are up")
        yield from resting(it, "without processes")
        yield from started(it)


def resting(it: VirtualCluster, when: str) -> Iterator[Row]:
    """The master's processor and memory, with everybody's heartbeats."""
    time.sleep(SETTLE)
    master = family(it.pid("master"), frozenset([it.pid("n0")]))
    before, start = cpu(master), time.perf_counter()
    time.sleep(REST)
    yield Row(f"at rest, {when}, of a core", (cpu(master) - before) / (time.perf_counter() - start) * 100, "%")
    yield Row("... memory of bpmaster (PSS)", memory([it.pid("master")])[0], "MB")


def started(it: VirtualCluster) -> Iterator[Row]:
    """A job for each node, which says that it has forked."""
    count = NODES * (1 + CHILDREN)
    daemon = [it.pid("master")]
    used, start = cpu(daemon), time.perf_counter()
    words = [str(TOP / "bpfs/bin/bpsh"), "-n", f"1-{NODES}", "sleep", "1000"]
    environment = {**os.environ, "BPFS": str(it.mount)}
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, env=environment, **quiet) as bpsh:
        wait_for(lambda: born(bpsh.pid) == NODES * CHILDREN, "not all have ghosts")
        yield Row(f"{count:,} processes come", count / (time.perf_counter() - start), "1/s")
        yield Row("... bpmaster's processor time, each", (cpu(daemon) - used) / count * 1e3, "ms")
        yield from resting(it, f"with {count:,} processes")
        yield from asked(it)
        used, start = cpu(daemon), time.perf_counter()
        for pid in children(bpsh.pid):
            os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not any(map(str.isdigit, os.listdir(it.mount / "procs"))), "not all have ended")
        yield Row(f"{count:,} processes end", count / (time.perf_counter() - start), "1/s")
        yield Row("... bpmaster's processor time, each", (cpu(daemon) - used) / count * 1e3, "ms")
        bpsh.wait()


def born(bpsh: int) -> int:
    """How many ghosts there are of what its jobs have forked; this machine may have those of other clusters as well."""
    return sum(len(children(job)) for job in children(bpsh))


def asked(it: VirtualCluster) -> Iterator[Row]:
    """Who reads about all of them, and what an entry takes of bpmaster's processor time."""
    mount, numbers = it.mount, range(1, NODES + 1)
    pids = [name for name in os.listdir(mount / "procs") if name.isdigit()]
    some = pids[:: len(pids) // ASKED][:ASKED]
    kernel = [f"/proc/{pid}/stat" for pid in some]
    questions: list[tuple[str, int, Callable[[], object], Callable[[], object] | None]] = [
        ("status", NODES, lambda: read_all([f"{mount}/status"]), None),
        ("nodes/*/load", NODES, lambda: read_all([f"{mount}/nodes/{number}/load" for number in numbers]),
         lambda: read_all(["/proc/loadavg"] * NODES)),
        ("ls -l nodes", NODES, lambda: list_all(f"{mount}/nodes"), None),
        ("ls procs", len(pids), lambda: os.listdir(mount / "procs"), lambda: os.listdir("/proc")),
        ("ls -l procs", len(pids), lambda: list_all(f"{mount}/procs"), lambda: list_all("/proc")),
        ("ls nodes/*/procs", len(pids), lambda: [os.listdir(f"{mount}/nodes/{number}/procs") for number in numbers],
         None),
        ("procs/*/state", len(some), lambda: read_all([f"{mount}/procs/{pid}/state" for pid in some]),
         lambda: read_all(kernel)),
        ("procs/*/stat, which nodes tell", len(some), lambda: read_all([f"{mount}/procs/{pid}/stat" for pid in some]),
         lambda: read_all(kernel)),
    ]  # fmt: skip
    for what, count, question, native in questions:
        taken, used = cost(it, question)
        base = cost(it, native)[0] if native is not None else 0.0
        note = "/proc, as many" if base else ""
        yield Row(f"{what}: one of {count:,}", taken / count * 1e6, "us", base / count * 1e6, note)
        yield Row("... of it bpmaster's processor time", used / count * 1e6, "us")


def cost(it: VirtualCluster, question: Callable[[], object], rounds: int = 3) -> tuple[float, float]:
    """Seconds by the clock, and of bpmaster's processor time, for a question; the least and the mean of some rounds."""
    daemon, clocks = [it.pid("master")], []
    question()
    before = cpu(daemon)
    for _ in range(rounds):
        start = time.perf_counter()
        question()
        clocks.append(time.perf_counter() - start)
    return min(clocks), (cpu(daemon) - before) / rounds
