"""bplib: what it writes and shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CACHE = "objects 3\nbytes 4096\nlimit 1000000\nhits 7\nmisses 3\nfetched_bytes 4096\nevicted 0\ndamaged 0\n"


def bplib(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bpfs.cli.bplib", "--mount", str(tree), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def with_views(tree: Path, *nodes: int) -> None:
    for node in nodes:
        (tree / f"nodes/{node}/cache").write_text(CACHE)


def test_it_lists_what_nodes_keep(plain_tree: Path) -> None:
    with_views(plain_tree, 1, 4)
    head, *rows = [line.split() for line in bplib(plain_tree, "-l", "-S", "1,4").stdout.splitlines()]
    assert head[:4] == ["node", "objects", "bytes", "limit"]
    assert [row[:6] for row in rows] == [[n, "3", "4096", "1000000", "7", "3"] for n in ("1", "4")]
    assert [row["node"] for row in json.loads(bplib(plain_tree, "-l", "--json", "-S", "4").stdout)] == [4]


def test_it_fetches_and_clears(plain_tree: Path) -> None:
    with_views(plain_tree, 1, 4)
    libraries = plain_tree / "libraries"
    assert bplib(plain_tree, "-S", "1", "-a", "/lib/libm.so.6").returncode == 0
    assert (plain_tree / "nodes/1/cache").read_text() == "prestage /lib/libm.so.6\n"
    assert bplib(plain_tree, "-c").returncode == 0
    assert [(plain_tree / f"nodes/{n}/cache").read_text() for n in (0, 1, 4)] == ["\n", "purge\n", "purge\n"]
    assert libraries.read_text() == "clear\n"


def test_the_list(plain_tree: Path) -> None:
    libraries = plain_tree / "libraries"
    libraries.write_text("/lib/a\n/lib/b\n")
    assert bplib(plain_tree, "-l").stdout == "/lib/a\n/lib/b\n"
    assert json.loads(bplib(plain_tree, "-l", "--json").stdout) == ["/lib/a", "/lib/b"]
    assert bplib(plain_tree, "-a", "/usr/../usr/bin/env").returncode == 0
    assert libraries.read_text() == "add /usr/bin/env\n"
    assert bplib(plain_tree, "-d", "/lib/a").returncode == 0
    assert libraries.read_text() == "delete /lib/a\n"


def test_errors(plain_tree: Path) -> None:
    run = bplib(plain_tree, "-S", "1", "-d", "/lib/x")
    assert (run.returncode, run.stderr.startswith("bplib: nodes keep contents, not names")) == (1, True)
    assert bplib(plain_tree).returncode == 2


def test_what_is_not_there_is_not_added(plain_tree: Path) -> None:
    added = bplib(plain_tree, "-a", "/no/such/lib.so")
    assert (added.returncode, added.stderr) == (1, "bplib: /no/such/lib.so: No such file or directory\n")
