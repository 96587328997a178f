# SPDX-License-Identifier: GPL-2.0-or-later
"""Output of a command on a node: ``bpsh 1 cat FILE`` beside the same file over plain TCP."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.frame import Row
from tests.benchmarks.subject import MB, PIECE, connect, other_process, stage
from tests.cluster.virtual import TOP, VirtualCluster

SIZE = 256 * MB
ROUNDS = 5
BPSH = TOP / "bpfs" / "bin" / "bpsh"


def by_bpsh(it: VirtualCluster, path: Path) -> float:
    """Seconds until all that cat wrote on the node has come out of bpsh's pipe here."""
    buffer = bytearray(PIECE)
    start = time.perf_counter()
    with subprocess.Popen(
        [BPSH, "1", "cat", path], stdout=subprocess.PIPE, bufsize=0, env={**os.environ, "BPFS": str(it.mount)}
    ) as process:
        assert process.stdout is not None
        got = 0
        while count := os.readv(process.stdout.fileno(), [buffer]):
            got += count
    assert (got, process.returncode) == (SIZE, 0)
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
    ours: list[float] = []
    plain: list[float] = []
    with stage() as (it, folder):
        path = folder / "data"
        path.write_bytes(os.urandom(MB) * (SIZE // MB))

        def send(connection: socket.socket) -> None:
            buffer = memoryview(bytearray(PIECE))
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    connection.sendall(buffer[:count])

        with other_process(send) as port:
            for _ in range(ROUNDS):
                ours.append(by_bpsh(it, path))
                plain.append(by_tcp(port))
    rate, base = SIZE / min(ours) / 1e6, SIZE / min(plain) / 1e6
    yield Row(f"bpsh 1 cat of 256 MB, best of {ROUNDS}", rate, "MB/s", base, "read and sent over plain TCP")
