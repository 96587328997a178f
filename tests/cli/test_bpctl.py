"""bpctl: what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def bpctl(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bpfs.cli.bpctl", "--mount", str(tree), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def values(tree: Path, name: str) -> str:
    return " ".join((tree / "nodes" / str(number) / name).read_text().split("\n")[0] for number in (-1, 0, 1, 2, 3))


def test_each_action_writes_its_file(plain_tree: Path) -> None:
    run = bpctl(plain_tree, "-S", "0-1", "-s", "down", "-m", "100", "-u", "daemon", "-g", "100")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert values(plain_tree, "state") == "up down down up down"
    assert values(plain_tree, "mode") == "111 100 100 111 111"
    assert values(plain_tree, "owner") == "root daemon daemon root root"
    assert values(plain_tree, "group") == "root 100 100 root root"


def test_selections_hold_for_what_follows(plain_tree: Path) -> None:
    assert bpctl(plain_tree, "-s", "error", "-S", "0", "-S", "2", "-R", "-M", "-s", "down", "-f").returncode == 0
    assert values(plain_tree, "state") == "down error up reboot down"


def test_the_cache_is_purged(plain_tree: Path) -> None:
    assert bpctl(plain_tree, "-S", "0,2", "--cache-purge").returncode == 0
    assert values(plain_tree, "cache") == " purge  purge "


def test_modes_have_x_bits_only(plain_tree: Path) -> None:
    run = bpctl(plain_tree, "-S", "0", "-m", "777")
    assert run.returncode == 2 and "'777' has other bits than the x bits, 111" in run.stderr


def test_one_refusal_does_not_stop_the_rest(plain_tree: Path) -> None:
    file = plain_tree / "nodes/1/state"
    file.unlink()
    file.mkdir()
    run = bpctl(plain_tree, "-S", "0-2", "-H", "--json")
    assert run.returncode == 1
    assert run.stderr == "bpctl: 1: cannot set state of node 1 to halt: Is a directory\n"
    assert [(entry["node"], entry["error"] == "") for entry in json.loads(run.stdout)] == [
        (0, True),
        (1, False),
        (2, True),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["-s", "down"], 2, "no nodes given: -S NODES or -M"),
        (["-S", "1"], 2, "nothing to do given: see --help"),
        (["-S", "1", "-m", "9"], 2, "argument -m/--mode: '9' is not an octal mode such as 111"),
        (["-S", "1,9", "-s", "down"], 1, "bpctl: there is no node 9"),
        (["-S", "1", "-r", "/x"], 1, "bpctl: nodes cannot change their root directory"),
    ],
)
def test_errors_change_nothing(plain_tree: Path, arguments: list[str], code: int, sentence: str) -> None:
    before = values(plain_tree, "state")
    run = bpctl(plain_tree, *arguments)
    assert run.returncode == code
    assert run.stderr.rstrip().endswith(sentence)
    assert values(plain_tree, "state") == before
