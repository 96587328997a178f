"""Hold, resume, change of node and return home, with bytes in flight: nothing is lost, nothing comes twice."""

from __future__ import annotations

import hashlib
import os
import random
import select
import socket
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from functools import partial

import pytest
import trio

from bpfs.procs.ghost import Held
from bpfs.slave.relay import Ends, Relay, open_relay
from tests.procs.ghost_rig import (
    DEADLINE,
    IN_OUT,
    PIPES,
    VICTIMS,
    Rig,
    ended,
    eventually,
    external,
    in_thread,
    open_rig,
    read_all,
    readable,
    taken,
    write_all,
)

MEGABYTE = 1 << 20


class Wanderer:
    """A job that can be frozen, and get other ends."""

    def __init__(self, rig: Rig, ends: Ends) -> None:
        self.control, theirs = socket.socketpair()
        self.control.settimeout(DEADLINE)
        with theirs:
            args = [sys.executable, "-I", "-S", str(VICTIMS / "wanderer.py"), str(theirs.fileno())]
            self.process = rig.job(ends, args, pass_fds=[theirs.fileno()])

    async def freeze(self) -> None:
        """It is between two system calls afterwards, and stays there."""

        def work() -> None:
            self.control.sendall(b"x")
            assert self.control.recv(1) == b"F"

        await in_thread(work)

    async def thaw(self, ends: Ends | None = None) -> None:
        """It goes on, with the same ends or others."""

        def work() -> None:
            socket.send_fds(self.control, [b"f"], [ends.job[0], ends.job.get(1, ends.job[0])] if ends else [])
            assert self.control.recv(1) == b"G"

        await in_thread(work)
        if ends:
            ends.close_job()


async def count_and_hash(fd: int, found: list[int], digest: hashlib._Hash, total: int) -> None:
    """A reader that takes its time. A socket's end of file comes only with the job's end."""
    while found[0] < total:
        part = await trio.to_thread.run_sync(os.read, fd, 100_000, abandon_on_cancel=True)
        assert part, f"the end of file came after {found[0]} bytes of {total}"
        digest.update(part)
        found[0] += len(part)
        await trio.sleep(0.002)


def reached(found: list[int], goal: int) -> bool:
    return found[0] >= goal


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["pipes", "socket"])
@pytest.mark.parametrize("change", ["resume", "switch"])
async def test_a_stream_survives_moves_with_bytes_in_flight(shape: str, change: str) -> None:
    data = random.Random(2).randbytes(MEGABYTE) * 6
    sock = shape == "socket"
    externals = [external(0, "socket", os.O_RDWR, [0, 1])] if sock else IN_OUT
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(open_rig())
        relays: list[Relay] = [await stack.enter_async_context(open_relay("127.0.0.1")) for _ in range(2)]
        if sock:
            mine, theirs = socket.socketpair()
            ghost, process = await rig.ghost(stdin=theirs, stdout=theirs)
            theirs.close()
            into, out = os.dup(mine.fileno()), os.dup(mine.fileno())
        else:
            ghost, process = await rig.ghost(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            into, out = taken(process.stdin), taken(process.stdout)
        ends = await rig.join(ghost, relays[0], externals)
        if sock:
            ends.job[1] = os.dup(ends.job[0])
        job = Wanderer(rig, ends)
        found, digest = [0], hashlib.sha256()

        async def feed() -> None:
            await write_all(into, data, close=not sock)
            if sock:
                mine.shutdown(socket.SHUT_WR)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed)
            nursery.start_soon(count_and_hash, out, found, digest, len(data))
            for move in range(1, 9):
                goal = len(data) * move // 10
                await eventually(partial(reached, found, goal), f"{goal} bytes are through")
                await job.freeze()
                await ghost.hold()
                if change == "resume":
                    await ghost.resume()
                    await job.thaw()
                    continue
                ends = await rig.join(ghost, relays[move % 2], externals, stream=move + 1)
                await job.thaw(ends)
        assert (found[0], digest.hexdigest()) == (len(data), hashlib.sha256(data).hexdigest())
        await ghost.exit(await ended(job.process))
        assert await ended(process) == 0
        assert not os.read(out, 1)
        os.close(out)
        job.control.close()
        if sock:
            os.close(into)
            mine.close()


async def test_the_end_of_file_survives_a_move() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as one, open_relay("127.0.0.1") as two:
        ghost, process = await rig.ghost(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        ends = await rig.join(ghost, one, IN_OUT)
        job_end = os.dup(ends.job[0])
        job = Wanderer(rig, ends)
        await job.freeze()
        await write_all(taken(process.stdin), b"last words")
        poll = select.poll()
        poll.register(job_end, 0)
        await eventually(lambda: poll.poll(0), "the end of file reaches the node, behind bytes that nobody has read")
        os.close(job_end)
        await ghost.hold()
        await ghost.resume()
        held = await ghost.hold()
        assert held == Held(1, 10)
        await job.thaw(await rig.join(ghost, two, IN_OUT, stream=2))
        out = taken(process.stdout)
        assert await read_all(out) == b"last words"
        await ghost.exit(await ended(job.process))
        assert await ended(process) == 0
        os.close(out)
        job.control.close()


async def test_unread_input_of_a_file_is_rewound_on_the_way_home() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(500_000))
            file.seek(100)
            ghost, _ = await rig.ghost(stdin=file, stdout=subprocess.DEVNULL)
            ends = await rig.join(ghost, relay, [external(0, "file", os.O_RDONLY)])
            # Nobody reads: the pipe fills.
            await eventually(lambda: file.tell() > 100 or os.lseek(file.fileno(), 0, 1) > 65536, "it reads ahead")
            assert await ghost.hold(home=True) == Held(0, 0)
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 100
            ends.close()


async def test_pumps_feed_held_input_and_pass_what_follows() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        read, write = os.pipe()
        ghost, process = await rig.ghost(stdin=read, stdout=subprocess.DEVNULL)
        ends = await rig.join(ghost, relay, [PIPES[0]])
        await write_all(write, b"before ", close=False)
        job_end = ends.job[0]
        await eventually(lambda: readable(job_end), "it arrives on the node")
        assert await ghost.hold(home=True) == Held(1, 7)
        await ghost.pump()
        await write_all(write, b"after")
        os.close(read)
        # What a process that comes home into the ghost would have as its descriptor 0:
        home = os.open(f"/proc/{process.pid}/fd/0", os.O_RDONLY)
        ends.close()
        await ghost.exit(0)
        assert await ended(process) == 0
        assert await read_all(home) == b"before after"
        os.close(home)


async def test_pumps_write_what_a_slow_reader_is_owed_before_what_comes_from_home() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        ghost, process = await rig.ghost(stdout=subprocess.PIPE)
        ends = await rig.join(ghost, relay, [PIPES[1]])
        job = rig.job(ends, ["head", "-c", "200000", "/dev/zero"])
        await ended(job)
        held = await ghost.hold(home=True)
        assert held == Held(1, 0)
        await ghost.pump()
        home = os.open(f"/proc/{process.pid}/fd/1", os.O_WRONLY)
        out = taken(process.stdout)
        await ghost.exit(0)
        assert await ended(process) == 0
        await write_all(home, b"from home")
        assert await read_all(out) == bytes(200000) + b"from home"
        os.close(out)
