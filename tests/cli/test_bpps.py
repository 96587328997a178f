"""bpps: whose lines of ps get which node."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpfs.cli.bpps import label


@pytest.fixture
def sleeper(plain_tree: Path) -> Iterator[int]:
    """A process that the tree says is on node 2."""
    process = subprocess.Popen(["sleep", "1000"])
    try:
        (plain_tree / "procs" / str(process.pid)).mkdir()
        (plain_tree / "procs" / str(process.pid) / "node").write_text("2\n")
        yield process.pid
    finally:
        process.kill()
        process.wait()


def bpps(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bpfs.cli.bpps", "--mount", str(tree), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "options",
    [["-ef"], ["aux"], ["-eo", "args,pid"], ["-o", "ppid,pid,lstart,comm", "-e"], ["-eo", "lstart,pid,args"], ["axj"]],
    ids=" ".join,
)
def test_whatever_ps_shows(plain_tree: Path, sleeper: int, options: list[str]) -> None:
    run = bpps(plain_tree, *options)
    assert (run.returncode, run.stderr) == (0, "")
    head, *lines = run.stdout.splitlines()
    assert head.startswith("NODE ")
    (line,) = [line for line in lines if re.search(rf"\b{sleeper}\b.*sleep|sleep.*\b{sleeper}\b", line)]
    assert line.split()[0] == "2"
    own = [line for line in lines if re.search(rf"(?<!\S){os.getpid()}(?!\S)", line)]
    assert own
    assert all(line.startswith("   - ") for line in own if "sleep" not in line)


def test_only_some_nodes(plain_tree: Path, sleeper: int) -> None:
    lines = bpps(plain_tree, "--nodes", "2", "-e", "-o", "pid,comm").stdout.splitlines()
    assert [line.split() for line in lines] == [["NODE", "PID", "COMMAND"], ["2", str(sleeper), "sleep"]]


def test_a_pid_that_is_pushed_aside() -> None:
    lines = ["USER       PID ARGS\n", "a-very-long-name 7 x\n", "root        12 12 7\n"]
    assert list(label(lines, {7: 1, 12: 3}, None)) == [f"NODE {lines[0]}", f"   1 {lines[1]}", f"   3 {lines[2]}"]


def test_errors(plain_tree: Path) -> None:
    run = bpps(plain_tree, "-o", "comm")
    assert run.returncode == 1
    assert run.stderr == "bpps: ps shows no column PID here: ask for one with its header, as in -o pid,args\n"
    run = bpps(plain_tree, "-p", "4194305")
    assert (run.returncode, len(run.stdout.splitlines())) == (1, 1)
