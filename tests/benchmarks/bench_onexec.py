# SPDX-License-Identifier: GPL-2.0-or-later
"""A command that a shell runs on a node by the next exec, beside the same command run here."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Iterator

from tests.benchmarks.bench_small import over_ssh
from tests.benchmarks.frame import Row
from tests.benchmarks.subject import stage

ROUNDS = 40


def run(path: object) -> float:
    """Seconds of a shell that writes its wish to `path` and becomes /bin/true."""
    start = time.perf_counter()
    subprocess.run(["bash", "-c", f"echo $$ onexec > {path}; exec /bin/true"], check=True)
    return time.perf_counter() - start


def rows() -> Iterator[Row]:
    """The table."""
    there, here = [], []
    with stage() as (it, _):
        run(it.mount / "nodes/1/migrate")
        for _ in range(ROUNDS):
            there.append(run(it.mount / "nodes/1/migrate"))
            here.append(run("/dev/null"))
    for how, of in (("median", statistics.median), ("least", min)):
        yield Row(f"onexec /bin/true, {how} of {ROUNDS}", of(there) * 1e3, "ms", of(here) * 1e3, "without the move")
        yield Row(f"added by the move, {how}", (of(there) - of(here)) * 1e3, "ms")
    logins = over_ssh()
    if logins:
        base = statistics.median(logins) * 1e3
        yield Row("onexec /bin/true, median", statistics.median(there) * 1e3, "ms", base, "ssh localhost true")
