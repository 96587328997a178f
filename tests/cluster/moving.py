"""A process that counts, moved by echo: what the tests of moves share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.virtual import VirtualCluster

# Counts on stdout, a line a step, until a line comes on stdin; then says what it counted and ends with 7.
COUNTER = """
import os, select, sys
n = 0
while not select.select([0], [], [], 0.01)[0]:
    n += 1
    print(n, os.getpid(), flush=True)
print("end", n, sys.stdin.readline().strip(), flush=True)
sys.exit(7)
"""


@contextmanager
def counting(python: str = sys.executable, cwd: str | None = None) -> Iterator[subprocess.Popen[str]]:
    """A counter that has begun; killed in the end, if need be."""
    process = subprocess.Popen(
        [python, "-c", COUNTER],
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    # Byte by byte: what a buffered reader takes in advance, `communicate` never sees.
    while os.read(process.stdout.fileno(), 1) != b"\n":
        pass
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def echo(it: VirtualCluster, text: object, path: str) -> subprocess.CompletedProcess[str]:
    """`echo TEXT > PATH` by bash, which tells the error's name."""
    return subprocess.run(
        ["bash", "-c", f"echo '{text}' > '{it.mount}/{path}'"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def move(it: VirtualCluster, pid: int, node: int) -> None:
    """Moves a process, which must work."""
    done = echo(it, pid, f"nodes/{node}/migrate")
    assert done.returncode == 0, done.stderr + it.read(f"nodes/{node}/migrate")


def place(it: VirtualCluster, pid: int) -> str:
    """Where a process is, as /bpfs says."""
    return it.read(f"procs/{pid}/node").strip()


def finish(process: subprocess.Popen[str]) -> list[str]:
    """Has a counter end; its lines."""
    out, err = process.communicate("enough\n", timeout=60)
    assert err == ""
    assert process.returncode == 7
    return out.splitlines()


def check_counting(lines: list[str], pid: int) -> None:
    """Every number came once, in order, from the same pid."""
    *steps, end = lines
    numbers = [int(line.split()[0]) for line in steps]
    assert numbers == list(range(2, len(steps) + 2)), "a line was lost or doubled"
    assert {line.split()[1] for line in steps} <= {str(pid)}
    assert end == f"end {numbers[-1] if numbers else 1} enough"


def processes_of(it: VirtualCluster, pid: int) -> list[str]:
    """Living processes that are `pid` in any of a cluster's pid namespaces, the ghost included, zombies not."""
    found = []
    # Path.glob of their files would look at each, and fail for one that ends in that moment (ESRCH).
    for status in [entry / "status" for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            own = fields["NSpid"].split()[-1] == str(pid) and fields["State"][0] not in "ZX"
            # The counter's pid is no other process's on this machine, whatever namespace it is in.
            if own and (status.parent.name == str(pid) or len(fields["NSpid"].split()) == 3):
                found.append(f"{status.parent.name} {fields['Name']}")
        except (OSError, KeyError, ValueError):
            continue
    return found


@contextmanager
def shell(script: str) -> Iterator[subprocess.Popen[str]]:
    """A shell that has said "on"."""
    process = subprocess.Popen(
        ["bash", "-c", f"echo on; {script}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "on\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
