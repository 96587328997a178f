# SPDX-License-Identifier: GPL-2.0-or-later
"""What jobs fork on a node: at which speed, beside the same on the master, and what it costs the master to follow."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks.frame import Row
from tests.benchmarks.subject import stage
from tests.cluster.virtual import VirtualCluster

ROUNDS = 15
CHILDREN = 20_000
WAYS = 64
CALLS = ("getpid", "read", "write", "futex", "fork + exec + wait")


def rows() -> Iterator[Row]:
    """The table."""
    with stage() as (it, folder):
        program = Path(folder) / "forks"
        subprocess.run(["gcc", "-O2", "-o", program, Path(__file__).with_name("forks.c")], check=True)

        def run(node: int, *arguments: object) -> list[float]:
            command = [str(program), *map(str, arguments)]
            if node >= 0:
                command = [
                    "sh",
                    "-c",
                    'echo "$$ onexec" > "$0"; exec "$@"',
                    f"{it.mount}/nodes/{node}/migrate",
                    *command,
                ]
            done = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, check=True)
            return [float(word) for word in done.stdout.split()]

        taken = {-1: [run(-1, "calls")], 1: [run(1, "calls")]}
        for _ in range(ROUNDS):
            for node, found in taken.items():
                found.append(run(node, "calls"))
        for index, name in enumerate(CALLS):
            there, here = (min(found[index] for found in taken[node]) for node in (1, -1))
            yield Row(name, there / 1e3, "us", here / 1e3, f"on the master; least of {ROUNDS + 1}")
        for us, name in ((0, "that end at once"), (20_000, "that live 20 ms")):
            yield from _storm(it, run, us, name)


def _storm(it: VirtualCluster, run: Callable[..., list[float]], us: int, name: str) -> Iterator[Row]:
    master, watch = (it.rundir.recorded()[role].pid for role in ("master", "watch"))
    here = run(-1, "storm", CHILDREN, WAYS, us)
    before = {pid: _cpu(pid) for pid in (master, watch)}
    memory = _memory(master)
    there = run(1, "storm", CHILDREN, WAYS, us)
    began = time.perf_counter()
    while any(child.isdigit() for child in os.listdir(it.mount / "procs")):
        time.sleep(0.005)
    late = time.perf_counter() - began
    waited = CHILDREN // WAYS * WAYS
    assert there[0] == here[0] == waited, (there, here)
    yield Row(f"{waited} forks {name}, {WAYS} ways", waited / there[1], "1/s", waited / here[1], "on the master")
    yield Row("  … all forgotten after", late * 1e3, "ms")
    for pid, role in ((master, "master"), (watch, "jobwatch")):
        yield Row(f"  … processor time of {role}", (_cpu(pid) - before[pid]) * 1e3, "ms")
    yield Row("  … growth of the master", (_memory(master) - memory) / 1024, "MB")


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> int:
    """kB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0])
