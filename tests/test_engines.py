"""Engine workers driven from trio: real ones, forked by a real zygote."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from errno import EIO, ESRCH

import msgpack
import pytest
import trio

from bpfs.engines import EngineSession, WorkerChannel, Workers, pack_call, unpack_reply
from bpfs.errors import BpfsError, EngineRefused


@pytest.fixture(scope="module")
def zygote():
    """A zygote of a process that never ran trio: pytest-trio's run is over whenever this is called."""
    from engine.zygote import Zygote

    it = Zygote.start()
    yield it
    it.close()


@pytest.fixture
def victim():
    process = subprocess.Popen(["sleep", "1000"])
    yield process.pid
    process.kill()
    process.wait()


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def _tracer(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("TracerPid"))


async def _wait_state(pid: int, states: str) -> None:
    with trio.fail_after(30):
        while _state(pid) not in states:
            await trio.sleep(0.005)


async def test_a_session_freezes_and_its_end_releases(zygote, victim):
    async with EngineSession(zygote.worker()) as session:
        await session.call("freeze", pid=victim, writing=False)
        await _wait_state(victim, "t")
        reply, fds = await session.call("inspect")
        assert reply["process"]["comm"] in ("sleep", b"sleep") and reply["refusals"] == [] and fds == []
    await _wait_state(victim, "SR")


async def test_what_the_worker_refuses(zygote):
    async with EngineSession(zygote.worker()) as session:
        with pytest.raises(EngineRefused) as caught:
            await session.call("freeze", pid=2**22 - 1, writing=False)
        assert caught.value.errno == ESRCH and str(caught.value)
        with pytest.raises(EngineRefused):
            await session.call("no such operation")


async def test_a_dead_worker_is_an_error(zygote, victim):
    session = EngineSession(zygote.worker())
    await session.call("freeze", pid=victim, writing=False)
    os.kill(_tracer(victim), signal.SIGKILL)
    with pytest.raises(BpfsError) as caught:
        await session.call("inspect")
    assert caught.value.errno == EIO and "died" in str(caught.value)
    await _wait_state(victim, "SR")
    with pytest.raises(BpfsError, match="closed"):
        await session.call("inspect")


async def test_spare_workers(zygote, nursery):
    workers = Workers(zygote)
    workers.FIRST_AFTER = 0.0
    nursery.start_soon(workers.keep_spare)
    for _ in range(3):
        with workers.open_socket() as sock:
            assert sock.type == socket.SOCK_SEQPACKET
        await trio.sleep(2 * workers.SPARE_AFTER)
    nursery.cancel_scope.cancel()


def test_a_zygote_that_is_gone_is_an_error():
    from engine.zygote import Zygote

    it = Zygote.start()
    it.close()
    with pytest.raises(BpfsError, match="no engine worker can be made") as caught:
        Workers(it).open()
    assert caught.value.errno == EIO


async def test_descriptors_pass_both_ways_and_cancelling_closes():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = WorkerChannel(ours)
    read, write = os.pipe()
    with theirs:
        theirs.setblocking(False)
        async with trio.open_nursery() as nursery:

            async def worker() -> None:
                await trio.lowlevel.wait_readable(theirs)
                body, fds, _, _ = socket.recv_fds(theirs, 1000, 10)
                assert body == b"request" and len(fds) == 1
                os.write(fds[0], b"through")
                socket.send_fds(theirs, [b"reply"], [fds[0]])
                os.close(fds[0])

            nursery.start_soon(worker)
            reply, fds = await channel.exchange(b"request", [write])
        assert reply == b"reply" and os.read(read, 100) == b"through"
        for fd in (read, write, *fds):
            os.close(fd)
        with trio.move_on_after(0.05) as scope:
            await channel.exchange(b"no answer comes")
        assert scope.cancelled_caught and channel.closed
        # The worker sees the end, and undoes what it was about.
        assert theirs.recv(100) == b"no answer comes" and theirs.recv(100) == b""


@pytest.mark.parametrize("packet", [b"", b"\xc1", msgpack.packb([1]), msgpack.packb("ok"), msgpack.packb({1: 2})])
def test_nonsense_from_a_worker_is_an_error(packet):
    with pytest.raises(BpfsError):
        unpack_reply(packet)


def test_requests_and_refusals():
    assert msgpack.unpackb(pack_call("freeze", {"pid": 3})) == {"op": "freeze", "pid": 3}
    refusal = {"ok": False, "errno": 95, "text": "2 threads", "refusals": ["2 threads", "fd 5 is a TCP socket"]}
    with pytest.raises(EngineRefused, match="2 threads") as caught:
        unpack_reply(msgpack.packb(refusal))
    assert caught.value.refusals == ("2 threads", "fd 5 is a TCP socket") and caught.value.errno == 95
