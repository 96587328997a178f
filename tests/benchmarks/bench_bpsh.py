# SPDX-License-Identifier: GPL-2.0-or-later
"""bpsh as a whole: one command on one node, and one on 64 and 256, beside what a user would pick instead."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.benchmarks.bench_idle import TICK
from tests.benchmarks.bench_small import over_ssh
from tests.benchmarks.frame import Row
from tests.benchmarks.sshd import sshd
from tests.cluster.virtual import TOP, VirtualCluster, cluster

NODES = 64
LARGE = 256
ROUNDS = 40
MANY_ROUNDS = 7
FEW_ROUNDS = 3
BPSH = str(TOP / "bpfs" / "bin" / "bpsh")


def timed(command: Sequence[str], mount: Path, rounds: int) -> list[float]:
    """Seconds of a command, each time, after one that does not count."""
    environment = {**os.environ, "BPFS": str(mount)}
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        taken.append(time.perf_counter() - start)
    return taken[1:]


def spent(it: VirtualCluster) -> float:
    """Seconds of processor time of a cluster's daemons and of all that they have waited for."""
    total = 0
    for pid in it.processes():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue  # it has ended, and is in its parent's account
        total += sum(map(int, fields[11:15]))
    return total / TICK


def rows() -> Iterator[Row]:
    """The table."""
    logins = over_ssh()
    with tempfile.TemporaryDirectory(prefix="bench-") as name, cluster(Path(name) / "m", nodes=NODES) as it:
        one = timed([BPSH, "1", "/bin/true"], it.mount, ROUNDS)
        here = timed(["/bin/true"], it.mount, ROUNDS)
        for how, of in (("median", statistics.median), ("least", min)):
            yield Row(f"bpsh 1 /bin/true, {how} of {ROUNDS}", of(one) * 1e3, "ms", of(here) * 1e3, "/bin/true here")
        if logins:
            base = statistics.median(logins) * 1e3
            yield Row("bpsh 1 /bin/true, median", statistics.median(one) * 1e3, "ms", base, "ssh localhost true")
        else:
            yield Row("ssh localhost true", 0, "ms", note="not measured: no sshd (mountscripts/lib.sh)")
        yield from everywhere(it, statistics.median(logins) if logins else 0.0)
    yield from growing()


def everywhere(it: VirtualCluster, login: float) -> Iterator[Row]:
    """The same command on all nodes."""
    before = spent(it)
    many = timed([BPSH, "-a", "uptime"], it.mount, MANY_ROUNDS)
    time.sleep(1)  # what is cleared up after the last one counts as well
    cost = (spent(it) - before) / (MANY_ROUNDS + 1)
    pdsh, base = shutil.which("pdsh"), 0.0
    if pdsh:
        local = [pdsh, "-R", "exec", "-f", str(NODES), "-w", f"[0-{NODES - 1}]", "uptime"]
        base = min(timed(local, it.mount, MANY_ROUNDS))
    note = "pdsh -R exec: all of them here" if pdsh else "pdsh is not installed"
    yield Row(f"bpsh -a uptime, {NODES} nodes, least of {MANY_ROUNDS}", min(many), "s", base, note)
    base = over_pdsh(it.mount)
    note = "pdsh over ssh to this machine" if base else "not compared: no sshd, or no pdsh"
    yield Row("... median", statistics.median(many), "s", base, note)
    yield Row("... processor time of the whole cluster", cost, "s", cost and login * NODES, "ssh, one after another")


def over_pdsh(mount: Path) -> float:
    """Median seconds of pdsh, with as many logins by ssh at once; 0.0 where there is no such thing."""
    pdsh = shutil.which("pdsh")
    with sshd() as words:
        if words is None or pdsh is None:
            return 0.0
        command = [pdsh, "-R", "exec", "-f", str(NODES), "-w", f"[0-{NODES - 1}]", *words, "uptime"]
        return statistics.median(timed(command, mount, FEW_ROUNDS))


def growing() -> Iterator[Row]:
    """The same on more nodes, beside a part of the very same ones."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, cluster(Path(folder) / "m", nodes=LARGE) as it:
        part = timed([BPSH, f"0-{NODES - 1}", "uptime"], it.mount, FEW_ROUNDS)
        whole = timed([BPSH, "-a", "uptime"], it.mount, FEW_ROUNDS)
        note = f"{LARGE // NODES} times that of {NODES} of them"
        yield Row(
            f"bpsh -a uptime, {LARGE} nodes, least of {FEW_ROUNDS}", min(whole), "s", min(part) * LARGE / NODES, note
        )
