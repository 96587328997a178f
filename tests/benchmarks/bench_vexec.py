# SPDX-License-Identifier: GPL-2.0-or-later
"""bproc_vexecmove of many processes on 128 simulated nodes, and whose processor time it takes.

The nodes are simulated: what processes take there is not in it, but the speech of all their ends with the master is.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.bench_idle import cpu, family
from tests.benchmarks.bench_thousand import up
from tests.benchmarks.frame import Row
from tests.cluster.virtual import TOP, VirtualCluster, cluster, wait_until
from tests.nodes.simjobs import MORE, slaves

NODES = 128
WHO = ("bpmaster", "its helpers", "the simulated nodes", "the caller and the ghosts")
COUNTS = (1000, 15000)


def build(folder: Path) -> Path:
    """The program that calls it."""
    found = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "bproc"], capture_output=True, text=True, check=True,
        env={**os.environ, "PKG_CONFIG_PATH": str(TOP / "bpfs/bin/pkgconfig")},
    )  # fmt: skip
    source = Path(__file__).with_name("vexec.c")
    subprocess.run(["gcc", "-O2", "-o", folder / "vexec", source, *found.stdout.split()], check=True)
    return folder / "vexec"


def spent(it: VirtualCluster, simulated: int) -> list[float]:
    """Seconds of processor time of whom, see `WHO`."""
    master = it.pid("master")
    helpers = [pid for pid in family(master, frozenset([it.pid("n0")])) if pid != master]
    return [cpu([master]), cpu(helpers), cpu([simulated]), sum(os.times()[2:4])]


def rows() -> Iterator[Row]:
    """The table."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        cluster(Path(name) / "m", nodes=1) as it,
        slaves(it, NODES) as simulated,
    ):
        program = build(Path(name))
        wait_until(lambda: up(it) == NODES + 1 + MORE, "all nodes are up")
        for count in COUNTS:
            yield from measure(it, program, count, simulated)


def measure(it: VirtualCluster, program: Path, count: int, simulated: int) -> Iterator[Row]:
    """One call."""
    before = spent(it, simulated)
    run = subprocess.run(
        [program, str(count), str(NODES)], env={**os.environ, "BPFS": str(it.mount)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines, words = run.stdout.splitlines(), run.stdout.splitlines()[-1].split()
    assert len(lines) == count + 1 and words[2] == "0", run.stderr[-1000:]
    after = spent(it, simulated)
    yield Row(f"vexecmove of {count} on {NODES} nodes: the call", float(words[0]), "s")
    yield Row("… until all have ended", float(words[1]), "s")
    yield Row("… one of them", float(words[1]) / count * 1e3, "ms")
    for who, old, new in zip(WHO, before, after, strict=True):
        yield Row(f"… processor time of {who}, each", (new - old) / count * 1e3, "ms")
