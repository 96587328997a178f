"""Simulated slaves that take jobs: each job says a line, and ends with an exit code, without a process anywhere."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from bpfs.daemon import raise_limits
from bpfs.errors import LinkClosed
from bpfs.wire.handshake import read_key
from bpfs.wire.messages import (
    Done,
    JobMade,
    JobReport,
    JobsStatus,
    JobsStatusAre,
    MakeJob,
    Message,
    RelayDetach,
    Signal,
)
from bpfs.wire.streams import open_stream
from engine.facts import facts
from engine.jobspace import Kind
from tests.cluster.virtual import TOP, VirtualCluster
from tests.nodes.simslave import ANSWERS, SAMPLE, SimulatedSlave

# bpfs/procs/csrc/mux.h
FRAME = struct.Struct("<BBHI")
DATA, EOF, WINDOW, DRAIN, DRAINED, BYE = 1, 2, 3, 15, 16, 19
STDOUT = 1


@dataclass
class Jobs:
    """The jobs of one simulated slave."""

    slave: SimulatedSlave
    nursery: trio.Nursery
    mortal: bool  # its node is lost as soon as it is to make one

    def handlers(self) -> dict[type[Message], object]:
        """For `SimulatedSlave.handlers`."""
        return {
            MakeJob: self.make,
            RelayDetach: lambda _: Done(),
            Signal: lambda _: Done(),
            JobsStatus: lambda message: JobsStatusAre((b"",) * len(message.pids) * len(message.names)),
            **ANSWERS,
        }

    async def make(self, message: MakeJob) -> JobMade:
        """Handler: a job that says its node, its pid and the rank that its image has, and exits with the rank."""
        if self.mortal:
            assert self.slave.link is not None
            self.slave.link.close("it dies")
            await trio.sleep_forever()
        stream = trio.socket.from_stdlib_socket(await open_stream(self.slave.host, self.slave.port, message.token))
        assert self.slave.images is not None
        image = bytearray(message.image or await self.slave.images.take(message.name))
        for offset, text in message.patches:
            image[offset : offset + len(text)] = text
        found = re.search(rb"BPROC_RANK=(\d+)\0", image)
        rank = int(found[1]) if found else -1
        out = next(number for number, _, _, externals in message.channels if STDOUT in externals[0]["fds"])
        line = b"node %d pid %d rank %d\n" % (self.slave.number or 0, message.pid, rank)
        said = FRAME.pack(DATA, out, 0, len(line)) + line
        # Nobody is left who might write.
        said += b"".join(
            FRAME.pack(EOF, number, 0, 4) + bytes(4) for number, _, access, _ in message.channels if access
        )
        self.nursery.start_soon(self._live, stream, message.pid, rank, out, said)
        ends = [[1, number, number] for number, *_ in message.channels]
        return JobMade(message.pid, (), (), ends)

    async def _live(self, stream: trio.socket.SocketType, pid: int, code: int, out: int, said: bytes) -> None:
        assert self.slave.link is not None
        with stream:
            while head := await read(stream, FRAME.size):
                kind, channel, _, length = FRAME.unpack(head)
                body = await read(stream, length)
                if (kind, channel) == (WINDOW, out) and said:
                    await stream.send(said)
                    said = b""
                    ended = JobReport(int(Kind.CHILD), pid, 1, os.CLD_EXITED, code & 0x7F, 0, 0, 0, 0, 0, 0)
                    self.slave.link.notify_nowait(ended)
                elif kind == DRAIN:
                    await stream.send(FRAME.pack(DRAINED, 0, 0, 4) + body[:4])
                elif kind == BYE:
                    return


async def read(stream: trio.socket.SocketType, length: int) -> bytes:
    """So many bytes; none at the end of the stream."""
    got = b""
    while len(got) < length:
        try:
            part = await stream.recv(length - len(got))
        except OSError:
            return b""
        if not part:
            return b""
        got += part
    return got


MORTAL, SILENT, SHUT = 1, 2, 3
"""Beside nodes 1 to N: N + 1 dies when it is given a job, N + 2 never answers who wants an image, N + 3 refuses."""
MORE = 3


def be_slaves(host: str, port: int, key: Path, count: int) -> None:
    """Is nodes 1 to `count`, and MORE that have their faults, until it is killed."""
    secret, what = read_key(key), facts()
    raise_limits()  # a stream a job
    silent = socket.create_server(("", 0), backlog=count)
    shut = socket.socket()
    shut.bind(("", 0))
    doors = {count + SILENT: silent.getsockname()[1], count + SHUT: shut.getsockname()[1]}

    async def one(number: int, nursery: trio.Nursery) -> None:
        machine = os.urandom(16)  # who comes back tells so that his last life is over
        while True:
            slave = SimulatedSlave(port, number=number, key=secret, facts=what, machine=machine, keeps=True)
            slave.host, slave.door = host, doors.get(number)
            slave.handlers = Jobs(slave, nursery, number == count + MORTAL).handlers()
            try:
                await slave.run(SAMPLE)
            except (LinkClosed, OSError):
                pass  # the master has ended, or refuses for now
            await trio.sleep(0.5)

    async def all_of_them() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(1, count + MORE + 1):
                nursery.start_soon(one, number, nursery)

    trio.run(all_of_them)


@contextmanager
def slaves(it: VirtualCluster, count: int, beside: int | None = None) -> Iterator[int]:
    """Nodes 1 to `count`, and MORE, in a process of their own until the context ends; gives its pid.

    Args:
        beside: in the network namespace of this node, so that all have its link together.
    """
    enter = ["nsenter", "-n", "-t", str(it.pid(f"n{beside}")), "--"] if beside is not None else []
    where = it.rundir.read("port").split()
    words = [*enter, sys.executable, "-m", "tests.nodes.simjobs", *where, str(it.rundir.key), str(count)]
    process = subprocess.Popen(words, cwd=TOP, stdin=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    be_slaves(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
