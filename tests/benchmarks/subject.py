# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that benchmarks move (subject.c), and what moves are compared with: the same bytes over plain TCP."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Self

from tests.cluster.virtual import VirtualCluster, cluster

MB = 1 << 20
PIECE = MB  # bytes of one send or receive


@contextmanager
def folder_with_subject() -> Iterator[Path]:
    """A folder that every user may enter, with the compiled program `subject` in it."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        source = Path(__file__).with_name("subject.c")
        subprocess.run(["cc", "-O2", "-Wall", "-o", folder / "subject", source], check=True)
        yield folder


@contextmanager
def stage(nodes: int = 2, *options: str) -> Iterator[tuple[VirtualCluster, Path]]:
    """A cluster, made with these options, and the folder with the program."""
    with folder_with_subject() as folder, cluster(folder / "bpfs", *options, nodes=nodes) as it:
        yield it, folder


class Subject:
    """One running subject."""

    @classmethod
    @contextmanager
    def running(cls, it: VirtualCluster, *command: str | Path) -> Iterator[Self]:
        """One that is ready; killed in the end."""
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
            one = cls(process, it)
            try:
                assert one.line() == b"ready\n"
                yield one
            finally:
                process.kill()

    def __init__(self, process: subprocess.Popen[bytes], it: VirtualCluster) -> None:
        self._process = process
        self._it = it
        self.pid = process.pid

    def line(self) -> bytes:
        """The next line that it says."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def work(self, what: str) -> tuple[float, float]:
        """Seconds that a piece of work took it, by the clock and of processor time."""
        assert self._process.stdin is not None
        self._process.stdin.write(what.encode())
        clock, used = self.line().split()
        return int(clock) / 1e9, int(used) / 1e9

    def move(self, node: int, how: str = "") -> float:
        """Moves it by a write; the seconds from the opening of the file to its being closed."""
        start = time.perf_counter()
        fd = os.open(self._it.mount / f"nodes/{node}/migrate", os.O_WRONLY)
        os.write(fd, f"{self.pid} {how}\n".encode())
        os.close(fd)
        return time.perf_counter() - start


def subject(it: VirtualCluster, folder: Path, size: int) -> AbstractContextManager[Subject]:
    """A subject with `size` bytes of memory of its own, ready."""
    return Subject.running(it, folder / "subject", str(size))


def last_move(it: VirtualCluster, node: int) -> dict[str, float]:
    """The figures of the last move to a node: freeze_ms, total_ms, bytes."""
    words = it.read(f"nodes/{node}/migrate").splitlines()[-1].split()
    return {key: float(value) for key, _, value in (word.partition("=") for word in words) if value}


@contextmanager
def other_process(work: Callable[[socket.socket], None]) -> Iterator[int]:
    """A child that does its work with each connection to it; gives its TCP port on 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as listener:
        pid = os.fork()
        if pid == 0:
            try:
                while True:
                    with listener.accept()[0] as connection:
                        work(connection)
            finally:
                os._exit(1)
        try:
            yield listener.getsockname()[1]
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def connect(port: int) -> socket.socket:
    """A connection to such a child."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def into_fresh_memory(connection: socket.socket) -> None:
    """Receives a length and that many bytes into memory that nobody has touched yet; answers with one byte."""
    length = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little")
    with mmap.mmap(-1, length) as memory, memoryview(memory) as view:
        got = 0
        while got < length:
            got += connection.recv_into(view[got : got + PIECE])
        connection.send(b"!")


def tcp_copy(port: int, memory: memoryview) -> float:
    """Seconds to copy this to fresh memory of the child, connecting and its answer included."""
    start = time.perf_counter()
    with connect(port) as connection:
        connection.sendall(len(memory).to_bytes(8, "little"))
        connection.sendall(memory)
        assert connection.recv(1) == b"!"
    return time.perf_counter() - start
