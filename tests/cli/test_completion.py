"""Bash completion: options from --help, nodes from the tree, then the command's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]

SCRIPT = """
. mountscripts/completion
COMP_WORDS=("$@" ""); unset 'COMP_WORDS[-1]'
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
complete -p "$1" > /dev/null
function=$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\).*/\\1/')
compopt() { :; }
"$function" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the commands in it, as the PATH of an installation has them."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("bpstat", "bpctl", "bpcp", "bptop", "bplib"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nPYTHONPATH={TOP} exec {sys.executable} -m bpfs.cli.{name} "$@"\n')
        program.chmod(0o755)
    (folder / "bpsh").symlink_to(TOP / "bpfs" / "bin" / "bpsh")
    return folder


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("bpstat --upd", ["--update"]),
        ("bpstat 0,4", ["0,4"]),
        ("bpstat una", ["unavailable"]),
        ("bpctl -s hal", ["halt"]),
        ("bpctl -S 0,mas", ["0,master"]),
        ("bpctl -u roo", ["root"]),
        ("bpsh allu", ["allup"]),
        ("bpsh --tim", ["--time", "--timeout"]),
        ("bpsh --map 0:1 mkfif", ["mkfifo"]),
        ("bpcp READ", ["README.md"]),
        ("bpcp README.md allu", ["allup:"]),
        ("bpcp --rec", ["--recursive"]),
        ("bptop --nodes 0,mas", ["0,master"]),
        ("bptop --del", ["--delay"]),
        ("bplib -a READ", ["README.md"]),
        ("bpcluster sta", ["status"]),
        ("bpsh -n 0 mkfif", ["mkfifo"]),
    ],
)
def test_completion(plain_tree: Path, commands: Path, line: str, wanted: list[str]) -> None:
    run = subprocess.run(
        ["bash", "-c", SCRIPT, "bash", *line.split(" ")],
        cwd=TOP, capture_output=True, text=True, check=False,
        env={**os.environ, "BPFS": str(plain_tree), "PATH": f"{commands}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert (sorted(set(run.stdout.split())), run.stderr) == (wanted, "")
