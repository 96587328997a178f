"""bpstat: what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfs.cli import bpstat


def shown(tree: Path, *arguments: str, stdin: str = "") -> str:
    command = [sys.executable, "-m", "bpfs.cli.bpstat", "--mount", str(tree), *arguments]
    run = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def test_compact_folds_what_is_alike(plain_tree: Path) -> None:
    assert shown(plain_tree) == (
        "Node(s)                            Status          Mode       User     Group\n"
        "3                                  down            ---x--x--x root     root\n"
        "5                                  unavailable     ---x--x--- nobody   nogroup\n"
        "0-2,4,7                            up              ---x--x--x root     root\n"
    )


def test_long(plain_tree: Path) -> None:
    assert shown(plain_tree, "-l", "3,5,master") == (
        "Node Address         Status       Mode          User       Group\n"
        "  -1 10.0.0.254      up           ---x--x--x    root       root\n"
        "   3 -               down         ---x--x--x    root       root\n"
        "   5 10.0.0.6        unavailable  ---x--x---    nobody     nogroup\n"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-n", "up"], "0\n1\n2\n4\n7\n"),
        (["-n", "-R", "up"], "7\n4\n2\n1\n0\n"),
        (["-n", "-O", "7,0", "3"], "7\n0\n3\n"),
        (["-n", "-S"], "3\n5\n0\n1\n2\n4\n7\n"),
        (["-s", "3-5"], "down\nup\nunavailable\n"),
        (["-a", "2-4"], "10.0.0.3\n-\n10.0.0.5\n"),
        (["-t"], "7\n"),
        (["-t", "!up"], "2\n"),
        (["-A", "10.0.0.5"], "4\n"),
        (["-A", "10.0.0.254"], "-1\n"),
        (["-p"], "PID\tNode\n1234\t2\n1300\tmigrating\n"),
    ],
)
def test_short_forms(plain_tree: Path, arguments: list[str], text: str) -> None:
    assert shown(plain_tree, *arguments) == text


def test_ps_gets_a_column(plain_tree: Path) -> None:
    ps = "USER       PID COMMAND\nroot      1234 sleep\nroot      1299 sh\n"
    assert shown(plain_tree, "-P", stdin=ps) == (
        "NODE\tUSER       PID COMMAND\n2\troot      1234 sleep\n\troot      1299 sh\n"
    )


def test_json(plain_tree: Path) -> None:
    first = json.loads(shown(plain_tree, "--json"))[0]
    assert first == {
        "number": 0, "state": "up", "mode": "111", "owner": "root", "group": "root", "address": "10.0.0.1",
    }  # fmt: skip
    assert json.loads(shown(plain_tree, "-p", "--json"))[0] == {"pid": 1234, "node": "2"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["6"], "bpstat: there is no node 6\n"),
        (["-A", "10.9.9.9"], "bpstat: no node has the address of 10.9.9.9\n"),
        (["--mount", "/nowhere"], "bpstat: no cluster is mounted at /nowhere (bpcluster up starts one)\n"),
    ],
)
def test_errors_are_one_line(plain_tree: Path, arguments: list[str], sentence: str) -> None:
    command = [sys.executable, "-m", "bpfs.cli.bpstat", "--mount", str(plain_tree), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", sentence)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [(">/dev/full", "bpstat: No space left on device\n"), (">&-", "bpstat: Bad file descriptor\n"), ("2>&- 9", "")],
)
def test_what_cannot_be_said_is_an_error(plain_tree: Path, how: str, sentence: str) -> None:
    script = f'exec "$0" -m bpfs.cli.bpstat --mount "$1" {how}'
    run = subprocess.run(["sh", "-c", script, sys.executable, plain_tree], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", sentence)


@given(st.lists(st.integers(0, 999), min_size=1, unique=True), st.integers(11, 60))
def test_wrapping_loses_nothing(numbers: list[int], width: int) -> None:
    spec = ",".join(map(str, numbers))
    pieces = bpstat.wrap(spec, width)
    assert ",".join(pieces) == spec
    assert all(len(piece) <= width for piece in pieces)
