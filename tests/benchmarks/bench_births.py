# SPDX-License-Identifier: GPL-2.0-or-later
"""From a fork on a node to the child's ghost on the master, as its events tell: one at a time, and many at once."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.benchmarks.frame import Row
from tests.benchmarks.subject import stage
from tests.cluster.virtual import VirtualCluster

FORKS = 200
AT_ONCE = 8

# Says the pid of each child, and when fork returned, by the clock of the machine.
FORKER = """
import os, sys, time
for line in sys.stdin:
    made = []
    for _ in range(int(line)):
        now = time.monotonic()
        pid = os.fork()
        if not pid:
            os.closerange(0, 3)
            time.sleep(0.3)
            os._exit(0)
        made.append((pid, now))
    print(*(f"{pid} {now}" for pid, now in made), flush=True)
    for _ in made:
        os.wait()
"""


def rows() -> Iterator[Row]:
    """The table."""
    with stage() as (it, _):
        for count in (1, AT_ONCE):
            taken = sorted(_latencies(it, count))
            name = "fork to ghost" if count == 1 else f"  … of {count} forks at once"
            yield Row(name, statistics.median(taken), "ms", note=f"the child's is told of; {len(taken)} forks")
            yield Row("  … 99 of 100 within", taken[len(taken) * 99 // 100], "ms")
            yield Row("  … the longest", taken[-1], "ms")


def _latencies(it: VirtualCluster, count: int) -> Iterator[float]:
    """Milliseconds, of so many forks at a time."""
    command = ["sh", "-c", 'echo "$$ onexec" > "$0"; exec "$@"', f"{it.mount}/nodes/1/migrate"]
    with subprocess.Popen(
        [*command, sys.executable, "-c", FORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdin is not None and job.stdout is not None
        for _ in range(FORKS // count):
            with open(it.mount / "events") as events:
                print(count, file=job.stdin, flush=True)
                told: dict[int, float] = {}
                while len(told) < count:
                    words = next(events).split()
                    if words[2:] == ["forked", "by", str(job.pid)]:
                        told[int(words[1])] = time.monotonic()
            words = job.stdout.readline().split()
            for pid, forked in zip(words[::2], words[1::2], strict=True):
                yield (told[int(pid)] - float(forked)) * 1e3
        job.stdin.close()
