# SPDX-License-Identifier: GPL-2.0-or-later
"""1 GB to 8 nodes by bpcp: what leaves the master's link, and the time, beside cp and plain TCP of this machine.

The nodes have network namespaces and file systems in memory of their own; the master's link is its end of their bridge.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from bpfs.cli.virtualnet import bridge_name
from tests.benchmarks.frame import Row
from tests.benchmarks.subject import MB, PIECE, connect, other_process, stage
from tests.cluster.virtual import TOP, VirtualCluster

NODES = 8
SIZE = 1024 * MB
BPSH = str(TOP / "bpfs" / "bin" / "bpsh")


def on_all(it: VirtualCluster, *words: str) -> str:
    """What a command prints on all nodes."""
    command = [BPSH, "-n", "all", "--", *words]
    environment = {**os.environ, "BPFS": str(it.mount)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def left_the_master(it: VirtualCluster) -> int:
    """Bytes that the master has sent to its nodes."""
    return int(Path(f"/sys/class/net/{bridge_name(str(it.mount))}/statistics/tx_bytes").read_text())


def by_bpcp(it: VirtualCluster, source: Path, place: Path) -> float:
    """Seconds of the whole command."""
    command = [sys.executable, "-m", "bpfs.cli.bpcp", "-q", str(source), f"all:{place}"]
    start = time.perf_counter()
    subprocess.run(command, env={**os.environ, "BPFS": str(it.mount), "PYTHONPATH": str(TOP)}, check=True)
    return time.perf_counter() - start


def by_cp(source: Path, place: Path) -> float:
    """Seconds of as many copies here, one after the other, in memory as well."""
    start = time.perf_counter()
    for _ in range(NODES):
        subprocess.run(["cp", source, place / "copy"], check=True)
    return time.perf_counter() - start


def by_tcp(source: Path) -> float:
    """Seconds of one copy over a connection of this machine."""

    def send(connection: socket.socket) -> None:
        with open(source, "rb", buffering=0) as file:
            connection.sendfile(file)

    with other_process(send) as port:
        buffer, start = bytearray(PIECE), time.perf_counter()
        with connect(port) as connection:
            while connection.recv_into(buffer):
                pass
        return time.perf_counter() - start


def rows() -> Iterator[Row]:
    """The table."""
    if shutil.disk_usage("/dev/shm").free < (NODES + 2) * SIZE:
        yield Row(f"{SIZE // MB} MB to {NODES} nodes", 0, "s", note="not measured: it takes 10 GB of memory")
        return
    with stage(NODES, "--netns") as (it, folder):
        place, here = folder / "place", folder / "here"
        for path in (place, here):
            path.mkdir()
        on_all(it, "mount", "-t", "tmpfs", "none", str(place))
        subprocess.run(["mount", "-t", "tmpfs", "none", here], check=True)
        try:
            yield from measured(it, here, place)
        finally:
            subprocess.run(["umount", here], check=True)


def measured(it: VirtualCluster, here: Path, place: Path) -> Iterator[Row]:
    """With one source file in memory."""
    source = here / "data"
    source.write_bytes(os.urandom(16 * MB) * (SIZE // (16 * MB)))
    before = left_the_master(it)
    taken = by_bpcp(it, source, place)
    sent = left_the_master(it) - before
    with open(source, "rb") as file:
        wanted = sha256(file.read()).hexdigest()
    assert [line.split()[0] for line in on_all(it, "sha256sum", f"{place}/data").splitlines()] == [wanted] * NODES
    yield Row(f"1 GB to {NODES} nodes: out of the master's link", sent / SIZE, "GB", NODES, "a copy for each")
    yield Row("... time, checksums and fsync included", taken, "s", by_cp(source, here), f"{NODES} times cp, in memory")
    yield Row("... time", taken, "s", by_tcp(source) * NODES, f"{NODES} times plain TCP, into nothing")
