# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading and listing /bpfs with 1,000 nodes, beside the same on /proc and on a file system in memory."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.benchmarks.frame import Row, seconds
from tests.tree.mounted import Daemon, mounted

NODES = 1000


def read_all(paths: Sequence[str]) -> None:
    """Opens, reads to the end and closes, as cat does."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        while os.read(fd, 1 << 17):
            pass
        os.close(fd)


def list_all(directory: str) -> None:
    """Names, types and attributes, as ``ls -l`` asks for them."""
    with os.scandir(directory) as entries:
        for entry in entries:
            entry.stat(follow_symlinks=False)


def run(*command: str) -> None:
    """A program whose output is of no interest; nor are processes that end while /proc is listed."""
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check="/proc" not in command)


def rows() -> Iterator[Row]:
    """The table."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        with mounted(folder, "nodes_daemon", str(NODES)) as daemon:
            yield from reading(daemon)
            yield from listing(daemon, folder)


def reading(daemon: Daemon) -> Iterator[Row]:
    """Status files."""
    loads = [f"{daemon.mountpoint}/nodes/{number}/load" for number in range(NODES)]
    proc = seconds(lambda: read_all(["/proc/loadavg"] * NODES)) / NODES * 1e6
    ours = seconds(lambda: read_all(loads)) / NODES * 1e6
    yield Row("open, read, close of nodes/N/load", ours, "us", proc, "/proc/loadavg")
    cat_proc = seconds(lambda: run("cat", *["/proc/loadavg"] * NODES)) * 1e3
    cat_ours = seconds(lambda: run("cat", *loads)) * 1e3
    yield Row("cat nodes/*/load, 1,000 nodes", cat_ours, "ms", cat_proc, "cat of as many /proc/loadavg")

    def told() -> None:
        daemon.tell("load 7 1.00 1.00 1.00 1/1 1")
        read_all(loads[7:8])

    def only_told() -> None:
        daemon.tell("load 7 1.00 1.00 1.00 1/1 1")

    yield Row("a new load, and its first reader", seconds(told, 51) * 1e6, "us", seconds(only_told, 51) * 1e6, "unread")
    status = seconds(lambda: read_all([f"{daemon.mountpoint}/status"])) * 1e6
    yield Row("read of status, 1,000 lines", status, "us", proc * NODES, "1,000 reads of /proc/loadavg")


def listing(daemon: Daemon, folder: Path) -> Iterator[Row]:
    """Directories, beside one with as many directories on the file system of /tmp."""
    plain = folder / "plain"
    plain.mkdir()
    for number in range(NODES):
        (plain / str(number)).mkdir()
    nodes = f"{daemon.mountpoint}/nodes"
    ours, theirs = seconds(lambda: list_all(nodes)), seconds(lambda: list_all(str(plain)))
    yield Row("scandir and stat of nodes", ours * 1e3, "ms", theirs * 1e3, "as many directories on disk")
    ours, theirs = seconds(lambda: run("ls", "-l", nodes)), seconds(lambda: run("ls", "-l", str(plain)))
    yield Row("ls -l nodes", ours * 1e3, "ms", theirs * 1e3, "as many directories on disk")
    ours, theirs = ours, seconds(lambda: run("ls", "-l", "/proc"))
    yield Row("ls -l nodes", ours * 1e3, "ms", theirs * 1e3, f"ls -l /proc ({len(os.listdir('/proc'))} entries)")
