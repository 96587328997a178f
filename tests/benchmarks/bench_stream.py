# SPDX-License-Identifier: GPL-2.0-or-later
"""Input and output of a command on a node, beside the same file over plain TCP: ``bpsh 1 cat``, by a pipe each way."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.frame import Row
from tests.benchmarks.subject import MB, PIECE, connect, other_process, stage
from tests.cluster.virtual import TOP, VirtualCluster

SIZE = 1024 * MB
ROUNDS = 3
WAYS = {  # how the file goes there and back; stdout, where it is named, is /dev/null
    "bpsh 1 cat < FILE > /dev/null": '"$0" 1 cat < "$1" > /dev/null',
    "bpsh 1 cat FILE | cat > /dev/null": '"$0" 1 cat "$1" | cat > /dev/null',
    "cat FILE | bpsh 1 cat > /dev/null": 'cat "$1" | "$0" 1 cat > /dev/null',
    "cat FILE | bpsh 1 cat | cat > /dev/null": 'cat "$1" | "$0" 1 cat | cat > /dev/null',
}
BPSH = TOP / "bpfs" / "bin" / "bpsh"


def by_bpsh(it: VirtualCluster, way: str, path: Path) -> float:
    """Seconds of a command line."""
    start = time.perf_counter()
    subprocess.run(["sh", "-c", way, BPSH, path], env={**os.environ, "BPFS": str(it.mount)}, check=True)
    return time.perf_counter() - start


def by_tcp(port: int) -> float:
    """Seconds until all of the file has come over a connection."""
    buffer = bytearray(PIECE)
    start = time.perf_counter()
    with connect(port) as connection:
        got = 0
        while count := connection.recv_into(buffer):
            got += count
    assert got == SIZE
    return time.perf_counter() - start


def rows() -> Iterator[Row]:
    """The table."""
    with stage() as (it, _), tempfile.TemporaryDirectory(prefix="bench-", dir="/dev/shm") as memory:
        path = Path(memory) / "data"
        path.write_bytes(os.urandom(MB) * (SIZE // MB))

        def send(connection: socket.socket) -> None:
            buffer = memoryview(bytearray(PIECE))
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    connection.sendall(buffer[:count])

        with other_process(send) as port:
            for name, way in WAYS.items():
                ours, plain = [], []
                for _ in range(ROUNDS):
                    ours.append(by_bpsh(it, way, path))
                    plain.append(by_tcp(port))
                rate, base = SIZE / min(ours) / 1e6, SIZE / min(plain) / 1e6
                yield Row(f"1 GB: {name}", rate, "MB/s", base, f"best of {ROUNDS}; sent over plain TCP, into nothing")
