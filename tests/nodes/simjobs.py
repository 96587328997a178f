"""Simulated slaves that take jobs: each job says a line, and ends with an exit code, without a process anywhere.

Or it says that it has forked so many children, and lives, as they do, until a signal comes for it.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from bpfs.daemon import raise_limits
from bpfs.errors import LinkClosed
from bpfs.wire.handshake import read_key
from bpfs.wire.messages import (
    Done,
    JobEvents,
    JobMade,
    JobReport,
    JobsStatus,
    JobsStatusAre,
    JobStatus,
    JobStatusIs,
    MakeJob,
    Message,
    RelayDetach,
    Signal,
)
from bpfs.wire.streams import open_stream
from engine import jobwatch
from engine.facts import facts
from engine.jobspace import Kind
from engine.linux import procfs
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
    forks: int = 0  # children that each has, and lives; 0: it ends
    families: dict[int, list[int]] = field(default_factory=dict)  # job -> its children

    def handlers(self) -> dict[type[Message], object]:
        """For `SimulatedSlave.handlers`."""
        return {
            MakeJob: self.make,
            RelayDetach: lambda _: Done(),
            Signal: self.signal,
            JobStatus: lambda message: JobStatusIs(tuple(_file(name) for name in message.names)),
            JobsStatus: lambda message: JobsStatusAre(tuple(map(_file, message.names)) * len(message.pids)),
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
        if self.forks:
            self._fork(message)
        self.nursery.start_soon(self._live, stream, message.pid, rank, out, said)
        ends = [[1, number, number] for number, *_ in message.channels]
        return JobMade(message.pid, (), (), ends)

    def signal(self, message: Signal) -> Done:
        """Handler: whatever it is, the job and its children end of it."""
        children = self.families.pop(message.pid, None)
        if children is not None:
            for kind in (jobwatch.Kind.ENDED, jobwatch.Kind.REAPED):
                self._tell([_record(kind, pid, message.pid, message.pid, message.pid, message.sig) for pid in children])
            self._report(message.pid, os.CLD_KILLED, message.sig)
        return Done()

    def _fork(self, job: MakeJob) -> None:
        assert self.slave.welcome is not None
        free = self.slave.welcome.block_first + 2 + sum(map(len, self.families.values()))
        children = self.families[job.pid] = list(range(free, free + self.forks))
        group, session = job.pgid or job.pid, job.sid or job.pid
        self._tell([_record(jobwatch.Kind.IS, pid, job.pid, group, session) for pid in children])

    def _tell(self, records: list[bytes]) -> None:
        assert self.slave.link is not None
        self.slave.link.notify_nowait(JobEvents(b"".join(records)))

    def _report(self, pid: int, code: int, status: int) -> None:
        assert self.slave.link is not None
        self.slave.link.notify_nowait(JobReport(int(Kind.CHILD), pid, 1, code, status, 0, 0, 0, 0, 0, 0))

    async def _live(self, stream: trio.socket.SocketType, pid: int, code: int, out: int, said: bytes) -> None:
        assert self.slave.link is not None
        with stream:
            while head := await read(stream, FRAME.size):
                kind, channel, _, length = FRAME.unpack(head)
                body = await read(stream, length)
                if (kind, channel) == (WINDOW, out) and said:
                    await stream.send(said)
                    said = b""
                    if not self.forks:
                        self._report(pid, os.CLD_EXITED, code & 0x7F)
                elif kind == DRAIN:
                    await stream.send(FRAME.pack(DRAINED, 0, 0, 4) + body[:4])
                elif kind == BYE:
                    return


COMMAND = b"sleep\x001000\0"


def _record(kind: jobwatch.Kind, pid: int, ppid: int, pgid: int, sid: int, code: int = 0) -> bytes:
    size = (jobwatch.RECORD.size + len(COMMAND) + 3) & ~3
    head = jobwatch.RECORD.pack(size, kind, ord("S"), pid, ppid, pgid, sid, 0, code, 0, 0, len(COMMAND), b"sleep")
    return (head + COMMAND).ljust(size, b"\0")


def _file(name: str) -> bytes:
    return procfs.read(f"/proc/self/{name}")


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


def be_slaves(host: str, port: int, key: Path, count: int, forks: int) -> None:
    """Is nodes 1 to `count`, and MORE that have their faults, until it is killed; their jobs have `forks` children."""
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
            slave.handlers = Jobs(slave, nursery, number == count + MORTAL, forks).handlers()
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
def slaves(it: VirtualCluster, count: int, beside: int | None = None, forks: int = 0) -> Iterator[int]:
    """Nodes 1 to `count`, and MORE, in a process of their own until the context ends; gives its pid.

    Args:
        beside: in the network namespace of this node, so that all have its link together.
        forks: children that each job has; it lives then.
    """
    enter = ["nsenter", "-n", "-t", str(it.pid(f"n{beside}")), "--"] if beside is not None else []
    where = it.rundir.read("port").split()
    words = [*enter, sys.executable, "-m", "tests.nodes.simjobs", *where, str(it.rundir.key), str(count), str(forks)]
    process = subprocess.Popen(words, cwd=TOP, stdin=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    be_slaves(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
