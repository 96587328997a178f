"""Pipes, sockets and files of a job that runs elsewhere."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import subprocess
import tempfile

import pytest
import trio

from bpfs.errors import BpfsError
from bpfs.procs.ghost import StreamLost, connect_stream
from bpfs.slave.relay import StreamBroke, StreamEnded, make_ends, open_relay
from tests.procs.ghost_rig import (
    IN_OUT,
    OUT,
    PIPES,
    PYTHON,
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


async def test_three_pipes() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        ghost, process = await rig.ghost(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        ends = await rig.join(ghost, relay, PIPES)
        job = rig.job(ends, ["sh", "-c", "cat; echo error >&2; exit 3"])
        await write_all(taken(process.stdin), b"hello\n")
        out, err = taken(process.stdout), taken(process.stderr)
        assert await read_all(out) == b"hello\n"  # the end of file comes before the ghost ends
        assert await read_all(err) == b"error\n"
        assert process.poll() is None
        await ghost.exit(await ended(job))
        assert await ended(process) == 3
        assert await relay.events.receive() == StreamEnded(1)
        os.close(out)
        os.close(err)


@pytest.mark.slow
async def test_a_hundred_megabytes_through_and_back() -> None:
    block = random.Random(1).randbytes(MEGABYTE)
    digest = hashlib.sha256(block * 100).hexdigest()
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        ghost, process = await rig.ghost(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        ends = await rig.join(ghost, relay, IN_OUT)
        rig.job(ends, ["cat"])
        into, out = taken(process.stdin), taken(process.stdout)
        found = hashlib.sha256()

        def read() -> None:
            while part := os.read(out, MEGABYTE):
                found.update(part)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_all, into, block * 100)
            nursery.start_soon(in_thread, read)
        assert found.hexdigest() == digest
        os.close(out)


async def test_a_full_pipe_stalls_only_itself() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        ghost, process = await rig.ghost(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        ends = await rig.join(ghost, relay, PIPES[1:])
        rig.job(ends, ["sh", "-c", "(head -c 4000000 /dev/zero) & echo on stderr >&2; wait; echo late >&2"])
        out, err = taken(process.stdout), taken(process.stderr)
        line = b""
        while not line.endswith(b"\n"):  # nobody reads stdout yet
            await eventually(lambda: readable(err), "stderr gets through")
            line += os.read(err, 100)
        assert line == b"on stderr\n"
        assert len(await read_all(out)) == 4000000
        assert await read_all(err) == b"late\n"
        os.close(out)
        os.close(err)


async def test_a_closed_reader_gives_sigpipe() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        ghost, process = await rig.ghost(stdout=subprocess.PIPE)
        ends = await rig.join(ghost, relay, OUT)
        job = rig.job(ends, ["yes"], restore_signals=True)
        out = taken(process.stdout)
        await eventually(lambda: readable(out), "output comes")
        os.close(out)
        assert await ended(job) == -signal.SIGPIPE
        await ghost.killed(signal.SIGPIPE)
        assert await ended(process) == -signal.SIGPIPE


async def test_a_job_that_closes_its_input_frees_the_writer() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        read, write = os.pipe()
        ghost, process = await rig.ghost(stdin=read, stdout=subprocess.DEVNULL)
        os.close(read)
        ends = await rig.join(ghost, relay, [PIPES[0]])
        rig.job(ends, ["sh", "-c", "exec <&-; exec sleep 1000"])

        def broken() -> bool:
            try:
                return os.write(write, b"x") < 0
            except BrokenPipeError:
                return True

        await eventually(broken, "the writer gets EPIPE")
        os.close(write)
        assert process.poll() is None


async def test_output_is_complete_before_the_ghost_ends_even_for_a_slow_reader() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        ghost, process = await rig.ghost(stdout=subprocess.PIPE)
        ends = await rig.join(ghost, relay, OUT)
        # Fits into the pipes on the way: the job ends though nobody reads.
        job = rig.job(ends, ["head", "-c", "300000", "/dev/zero"])
        assert await ended(job) == 0
        await ghost.exit(0)
        assert await ended(process) == 0  # the status is there at once, the rest is owed
        out = taken(process.stdout)
        assert len(await read_all(out)) == 300000
        os.close(out)
        assert await relay.events.receive() == StreamEnded(1)


async def test_a_child_that_outlives_the_job_goes_on_writing() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        ghost, process = await rig.ghost(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        ends = await rig.join(ghost, relay, IN_OUT)
        job = rig.job(ends, ["sh", "-c", "exec 3<&0; cat <&3 3<&- & echo parent"])
        out, into = taken(process.stdout), taken(process.stdin)
        assert await ended(job) == 0
        await ghost.exit(0)
        assert await ended(process) == 0
        await write_all(into, b"for the child\n")
        assert await read_all(out) == b"parent\nfor the child\n"
        os.close(out)
        assert await relay.events.receive() == StreamEnded(1)


async def test_what_the_job_left_of_a_file_is_there_for_the_next_reader() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        with tempfile.TemporaryFile() as file:
            file.write(b"".join(b"%07d\n" % n for n in range(100000)))
            file.seek(8)
            ghost, process = await rig.ghost(stdin=file, stdout=subprocess.PIPE)
            ends = await rig.join(ghost, relay, [external(0, "file", os.O_RDONLY), PIPES[1]])
            job = rig.job(ends, [*PYTHON, "import os; os.write(1, os.read(0, 8)); os.write(1, os.read(0, 8))"])
            out = taken(process.stdout)
            assert await read_all(out) == b"0000001\n0000002\n"
            await ghost.exit(await ended(job))
            assert await ended(process) == 0
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 24
            os.close(out)


async def test_output_into_a_file() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        with tempfile.TemporaryFile() as file:
            ghost, process = await rig.ghost(stdout=file)
            ends = await rig.join(ghost, relay, [external(1, "file", os.O_WRONLY)])
            job = rig.job(ends, ["seq", "100000"])
            await ghost.exit(await ended(job))
            assert await ended(process) == 0
            file.seek(0)
            assert file.read() == b"".join(b"%d\n" % n for n in range(1, 100001))


async def test_a_socket_carries_both_ways_and_its_half_close() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        ours, theirs = socket.socketpair()
        with ours:
            ghost, process = await rig.ghost(stdin=theirs, stdout=theirs)
            theirs.close()
            ends = await rig.join(ghost, relay, [external(0, "socket", os.O_RDWR, [0, 1])])
            ends.job[1] = os.dup(ends.job[0])
            job = rig.job(ends, ["sh", "-c", "cat; echo end"])
            await write_all(ours.fileno(), b"over there\n" * 50000, close=False)
            ours.shutdown(socket.SHUT_WR)
            # The first part is in the buffers; the reader starts only now.
            parts: list[bytes] = []
            while not (parts and b"".join(parts[-2:]).endswith(b"end\n")):
                await eventually(lambda: readable(ours.fileno()), "the socket carries it")
                parts.append(ours.recv(MEGABYTE))
            assert b"".join(parts) == b"over there\n" * 50000 + b"end\n"
            await ghost.exit(await ended(job))
            assert await ended(process) == 0
            assert ours.recv(1) == b""
            assert await relay.events.receive() == StreamEnded(1)


async def test_killed_ghost_breaks_the_stream_and_detach_closes_the_jobs_ends() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        ghost, process = await rig.ghost(stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        ends = await rig.join(ghost, relay, [PIPES[0]])
        job = rig.job(ends, ["sh", "-c", "read line; exit 5"])
        process.kill()
        assert await relay.events.receive() == StreamBroke(1)
        assert job.poll() is None
        await relay.detach(1)
        assert await ended(job) == 5


async def test_a_wrong_token_is_turned_away() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        ghost, process = await rig.ghost(stdout=subprocess.PIPE)
        ends = make_ends(OUT)
        token = relay.expect(1, ends)
        with pytest.raises(BpfsError):
            await connect_stream("127.0.0.1", relay.port, bytes(32))
        connection = await connect_stream("127.0.0.1", relay.port, token)
        await relay.wait_attached(1)
        with pytest.raises(BpfsError):  # used once
            await connect_stream("127.0.0.1", relay.port, token)
        await ghost.stream(connection, ends.ghost_table)
        rig.job(ends, ["echo", "through"])
        out = taken(process.stdout)
        assert await read_all(out) == b"through\n"
        os.close(out)


async def test_a_peer_that_sends_nonsense_is_dropped() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        ends = make_ends(OUT)
        token = relay.expect(1, ends)
        connection = await connect_stream("127.0.0.1", relay.port, token)
        await relay.wait_attached(1)
        with connection:
            connection.setblocking(True)
            connection.sendall(b"\x01\x00\x00\x00\xff\xff\xff\xff" + bytes(100))
            assert await relay.events.receive() == StreamBroke(1)
        ends.close()
        ghost, _ = await rig.ghost(stdout=subprocess.DEVNULL)
        ours, theirs = socket.socketpair()
        with ours:
            await ghost.stream(theirs, b"")
            ours.sendall(b"\xff" * 64)
            await eventually(lambda: rig.events(ghost, StreamLost), "the ghost drops it, too")
