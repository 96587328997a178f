# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of the master on nodes with an empty root, beside the same programs on the local disk, in turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.bench_cache import cache
from tests.benchmarks.frame import Row
from tests.cluster.virtual import TOP, VirtualCluster, cluster

PYTHON = "/usr/bin/python3"
ROUNDS = 8
COLD = 3  # nodes that have never seen NumPy
CHANGES = 50

DRIVER = """
import json, os, subprocess, sys, time
os.chdir("/tmp")
open("view-bench.c", "w").write("#include <stdio.h>\\nint main(void) { return !puts(\\"x\\"); }\\n")
taken = []
for command in json.loads(sys.argv[1]):
    times = []
    for _ in range(int(sys.argv[2]) + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    taken.append(times[1:])
print(json.dumps(taken))
"""

WATCHER = """
import sys, time
seen, path = "", sys.argv[1]
print("ready", flush=True)
for _ in range(int(sys.argv[2])):
    while (text := open(path).read()) == seen or not text.endswith("\\n"):
        time.sleep(0.0005)
    now, seen = time.time(), text
    print(now - float(text), flush=True)
"""


def bpsh(it: VirtualCluster, node: int, *command: str) -> list[str]:
    """The command line that runs a command on a node."""
    return ["env", f"BPFS={it.mount}", str(TOP / "bpfs/bin/bpsh"), str(node), *command]


def has_numpy() -> bool:
    """Whether there is one for the system's Python."""
    return subprocess.run([PYTHON, "-c", "import numpy"], capture_output=True, check=False).returncode == 0


def warm(it: VirtualCluster, commands: dict[str, list[str]]) -> Iterator[Row]:
    """Both sides in turns, each with everything in its caches."""
    there: dict[str, list[float]] = {name: [] for name in commands}
    here: dict[str, list[float]] = {name: [] for name in commands}
    driver = [PYTHON, "-c", DRIVER, json.dumps(list(commands.values())), str(ROUNDS)]
    for _ in range(4):
        for found, command in ((there, bpsh(it, 0, *driver)), (here, driver)):
            output = subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL).stdout
            for name, times in zip(commands, json.loads(output), strict=True):
                found[name] += times
    for name in commands:
        for how, of in (("median", statistics.median), ("least", min)):
            yield Row(f"warm {name}, {how}", of(there[name]) * 1e3, "ms", of(here[name]) * 1e3, "local disk")


def cold(it: VirtualCluster) -> Iterator[Row]:
    """NumPy on nodes that have nothing yet: from the master's bpsh to its end."""
    command = [PYTHON, "-c", "import numpy"]
    taken, fetched = [], []
    for node in range(1, 1 + COLD):
        began = time.perf_counter()
        subprocess.run(bpsh(it, node, *command), check=True, stdin=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
        fetched.append(cache(it, node))
    began = time.perf_counter()
    subprocess.run(bpsh(it, 1, *command), check=True, stdin=subprocess.DEVNULL)
    again = time.perf_counter() - began
    yield Row(
        f"cold numpy, {fetched[-1]['objects']} objects, {fetched[-1]['fetched_bytes'] / 1e6:.0f} MB",
        statistics.median(taken) * 1e3, "ms", again * 1e3, "the second time",
    )  # fmt: skip


def changes(it: VirtualCluster, file: Path) -> Iterator[Row]:
    """From a write on the master until a reader on the node, who opens and reads all the time, has the new content."""
    file.write_text("0\n")
    with subprocess.Popen(
        bpsh(it, 0, PYTHON, "-c", WATCHER, str(file), str(CHANGES + 1)), stdout=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL,
    ) as watcher:  # fmt: skip
        assert watcher.stdout is not None and watcher.stdout.readline() == "ready\n"
        watcher.stdout.readline()
        taken = []
        for _ in range(CHANGES):
            new = file.with_suffix(".new")
            new.write_text(f"{time.time()}\n")
            new.rename(file)
            taken.append(float(watcher.stdout.readline()))
            time.sleep(0.05)
    yield Row(f"a change is seen, median of {CHANGES}", statistics.median(taken) * 1e3, "ms")
    yield Row("a change is seen, most", max(taken) * 1e3, "ms")


def rows() -> Iterator[Row]:
    """The table."""
    commands = {"/bin/true": ["/bin/true"], "gcc of a small file": ["gcc", "-o", "view-bench", "view-bench.c"]}
    with tempfile.TemporaryDirectory(prefix="bpfs-bench-") as folder:
        exported = Path(folder) / "exported"
        exported.mkdir()
        os.chmod(folder, 0o755)
        options = ("--root", "empty", "--export", str(exported))
        with cluster(Path(folder) / "m", *options, nodes=COLD + 1) as it:
            if has_numpy():
                commands["import numpy"] = [PYTHON, "-c", "import numpy"]
                yield from cold(it)
            yield from warm(it, commands)
            yield from changes(it, exported / "file")
