# SPDX-License-Identifier: GPL-2.0-or-later
"""1,250 to 10,000 ghosts on one master: jobs of ten nodes fork so many children, which do nothing."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.benchmarks.bench_idle import cpu, family, memory
from tests.benchmarks.frame import Row, seconds
from tests.benchmarks.subject import stage
from tests.cluster.virtual import VirtualCluster

NODES = 10
COUNTS = (1250, 2500, 5000, 10000)
REST = 5.0  # seconds
PATIENCE = 300.0  # seconds for all to show

# Forks as many children as it is told, and ends them all when its standard input ends.
PARENT = """
import os, signal, sys
children = []
for _ in range(int(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        os.close(0)
        while True:
            signal.pause()
    children.append(pid)
print("ready", flush=True)
sys.stdin.read()
for pid in children:
    os.kill(pid, 9)
for pid in children:
    os.waitpid(pid, 0)
"""


@contextmanager
def parents(orders: list[str], each: int) -> Iterator[list[subprocess.Popen[str]]]:
    """One process for each order, a shell command that has it exec its arguments; each forks so many children."""
    with ExitStack() as stack:
        found = []
        for order in orders:
            command = ["sh", "-c", order, "sh", "/usr/bin/python3", "-c", PARENT, str(each)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            found.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield found


def wait_ready(found: list[subprocess.Popen[str]]) -> None:
    """Until all have forked."""
    for process in found:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"


def end(found: list[subprocess.Popen[str]]) -> None:
    """Has them end their children, and themselves."""
    for process in found:
        assert process.stdin is not None
        process.stdin.close()


def ghosts() -> list[int]:
    """Those of children: their pids are of nodes' blocks (bpfs/pidspace.py)."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) >= 2 << 20]


def wait_for(count: int) -> None:
    """Until there are so many."""
    end = time.monotonic() + PATIENCE
    while len(ghosts()) != count:
        assert time.monotonic() < end, f"{len(ghosts())} ghosts, and not {count}"
        time.sleep(0.2)


def ps_aux() -> float:
    """Seconds."""
    return seconds(lambda: subprocess.run(["ps", "aux"], stdout=subprocess.DEVNULL, check=True), 3)


def ps_aux_at_home(count: int) -> float:
    """Seconds, with twice as many native processes: the jobs of nodes are on this machine as well as their ghosts."""
    with parents(['exec "$@"'] * NODES, 2 * count // NODES) as found:
        wait_ready(found)
        taken = ps_aux()
        end(found)
        for process in found:
            process.wait()
    return taken


def rows() -> Iterator[Row]:
    """The table; what is compared with is the first line of its kind, in proportion."""
    with stage(NODES) as (it, _):
        before = len(ghosts())
        first: dict[str, float] = {}
        bare = memory([it.pid("master")])[0]
        for count in COUNTS:
            native = ps_aux_at_home(count)
            for what, value, unit in measured(it, count, before, bare):
                base = first.setdefault(what, value)
                if not unit.endswith("/s"):
                    base *= count / COUNTS[0]
                note = "" if count == COUNTS[0] else f"{COUNTS[0]:,} of them, in proportion"
                if what == "ps aux":
                    base, note = native, "with as many native processes"
                yield Row(f"{count:,} ghosts: {what}", value, unit, base if note else 0.0, note)


def measured(it: VirtualCluster, count: int, before: int, bare: float) -> Iterator[tuple[str, float, str]]:
    """What so many take."""
    daemons = [it.pid("master")]
    orders = [f'echo "$$ onexec" > {it.mount}/nodes/{node}/migrate; exec "$@"' for node in range(NODES)]
    started, began = cpu(daemons), time.perf_counter()
    with parents(orders, count // NODES) as found:
        wait_ready(found)
        wait_for(before + count)
        yield "they come", count / (time.perf_counter() - began), "1/s"
        yield "bpmaster's processor time for that", cpu(daemons) - started, "s"
        yield "bpmaster's memory for them (PSS)", memory(daemons)[0] - bare, "MB"
        yield "their own (PSS)", memory(ghosts())[0], "MB"
        started, began = cpu(family(daemons[0], frozenset())), time.perf_counter()
        time.sleep(REST)
        used = cpu(family(daemons[0], frozenset())) - started
        yield "bpmaster at rest, of a core", used / (time.perf_counter() - began) * 100, "%"
        yield "ps aux", ps_aux(), "s"
        yield "ls /bpfs/procs", seconds(lambda: os.listdir(it.mount / "procs"), 3) * 1e3, "ms"
        started, began = cpu(daemons), time.perf_counter()
        end(found)
        wait_for(before)
        yield "they end", count / (time.perf_counter() - began), "1/s"
        yield "bpmaster's processor time for that end", cpu(daemons) - started, "s"
        while any(name.isdigit() for name in os.listdir(it.mount / "procs")):
            time.sleep(0.2)
