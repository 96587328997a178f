"""Links: requests both ways at once, errors, cancellation, slow and dead peers."""

from __future__ import annotations

import logging
import socket
from errno import EAGAIN, EIO, ENOENT, ENOSYS, ETIMEDOUT

import pytest
import trio
import trio.testing

from bpfs.errors import BpfsError, LinkClosed, RemoteError
from bpfs.wire import codec, link
from bpfs.wire.codec import Kind
from bpfs.wire.link import Link
from bpfs.wire.messages import (
    Done,
    EngineCall,
    EngineClose,
    EngineReply,
    Fault,
    FsReply,
    Heartbeat,
    HostPidIs,
    HostPidOf,
    KillAll,
)
from tests.wire.pairs import links, tcp_pair


def double(message: HostPidOf) -> HostPidIs:
    return HostPidIs(2 * message.pid)


async def slow_double(message: HostPidOf) -> HostPidIs:
    # The later asked, the sooner answered: replies have to find their own request.
    for _ in range(50 - message.pid):
        await trio.lowlevel.checkpoint()
    return HostPidIs(2 * message.pid)


async def test_requests_both_ways_answered_in_any_order():
    async with links({HostPidOf: slow_double}, {HostPidOf: slow_double}) as (near, far):
        got = {}

        async def ask(side: Link, pid: int) -> None:
            got[side, pid] = (await side.request(HostPidOf(pid))).hostpid

        async with trio.open_nursery() as nursery:
            for pid in range(50):
                nursery.start_soon(ask, near, pid)
                nursery.start_soon(ask, far, pid)
        assert got == {(side, pid): 2 * pid for side in (near, far) for pid in range(50)}


async def test_notices_are_handled_in_order():
    seen: list[int] = []
    finished = trio.Event()

    def take(message: Heartbeat) -> None:
        seen.append(message.count)
        if message.count == 999:
            finished.set()

    async with links({}, {Heartbeat: take}) as (near, _):
        for count in range(1000):
            near.notify_nowait(Heartbeat(count))
        await finished.wait()
    assert seen == list(range(1000))


async def test_a_handler_without_a_reply_means_done():
    async with links({}, {KillAll: lambda _: None}) as (near, _):
        assert await near.request(KillAll()) == Done()


async def test_errors_come_back_as_they_are(caplog):
    def refuse(_: KillAll) -> None:
        raise BpfsError(ENOENT, "there is no such thing")

    async def break_down(_: HostPidOf) -> None:
        raise ZeroDivisionError("oops")

    async with links({}, {KillAll: refuse, HostPidOf: break_down}) as (near, _):
        with pytest.raises(RemoteError) as caught:
            await near.request(KillAll())
        assert (caught.value.errno, str(caught.value)) == (ENOENT, "there is no such thing")
        with pytest.raises(RemoteError) as caught:
            await near.request(HostPidOf(1))
        assert caught.value.errno == EIO
        with pytest.raises(RemoteError) as caught:
            await near.request(EngineClose(1))
        assert caught.value.errno == ENOSYS
        with pytest.raises(RemoteError):  # the link has survived all of it
            await near.request(KillAll())
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


async def test_a_cancelled_request_cancels_its_handler():
    started, cancelled = trio.Event(), trio.Event()

    async def hang(_: KillAll) -> None:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with links({}, {KillAll: hang, HostPidOf: double}) as (near, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.request, KillAll())
            await started.wait()
            nursery.cancel_scope.cancel()
        await cancelled.wait()
        with pytest.raises(BpfsError) as caught:
            await near.request(KillAll(), timeout=0.01)
        assert caught.value.errno == ETIMEDOUT
        assert (await near.request(HostPidOf(4))).hostpid == 8


async def test_who_is_silent_is_waited_for_once():
    async def hang(_: KillAll) -> None:
        await trio.sleep_forever()

    async with links({}, {KillAll: hang, HostPidOf: double}) as (near, _):
        for sentence in (r"within 0\.1 s", r"within 0\.01 s", r"within 0\.01 s"):
            with pytest.raises(BpfsError, match=sentence):
                await near.request(KillAll(), timeout=0.1)
        assert (await near.request(HostPidOf(4))).hostpid == 8
        with pytest.raises(BpfsError, match=r"within 0\.1 s"):
            await near.request(KillAll(), timeout=0.1)


async def test_a_request_is_cancelled_in_the_moment_in_which_its_reply_is_read():
    async with links({}, {HostPidOf: double}) as (near, _), trio.open_nursery() as nursery:
        scopes = [trio.CancelScope() for _ in range(20)]

        async def ask(number: int) -> None:
            with scopes[number]:
                # The reply that comes right after, in the same piece, is that of the next.
                await near.request(HostPidOf(number), replied=scopes[(number + 1) % 20].cancel)

        for number in range(20):
            nursery.start_soon(ask, number)
        with trio.fail_after(10):
            assert (await near.request(HostPidOf(4))).hostpid == 8


async def test_the_end_of_a_link_ends_all_requests():
    async def hang(_: KillAll) -> None:
        await trio.sleep_forever()

    errors = []

    async def ask(near: Link) -> None:
        try:
            await near.request(KillAll())
        except LinkClosed as error:
            errors.append(str(error))

    handlers = {KillAll: hang, Heartbeat: lambda _: far.close("enough")}
    async with links({}, handlers) as (near, far), trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(ask, near)
        await trio.testing.wait_all_tasks_blocked()
        near.notify_nowait(Heartbeat(1))
    assert errors == ["the link to far ended: the peer closed the connection"] * 10
    with pytest.raises(LinkClosed):
        await near.request(KillAll())


async def test_large_messages_and_a_slow_reader():
    body = bytes(range(256)) * 3000

    async def echo(message: EngineCall) -> EngineReply:
        return EngineReply(message.body)

    async with links({}, {EngineCall: echo}) as (near, _):
        replies = []

        async def ask(session: int) -> None:
            replies.append((await near.request(EngineCall(session, body))).body)

        async with trio.open_nursery() as nursery:
            for session in range(20):
                nursery.start_soon(ask, session)
        assert replies == [body] * 20


async def test_a_peer_that_never_reads_is_given_up(monkeypatch):
    monkeypatch.setattr(link, "OVERFLOW", 4 << 20)
    sock, peer = tcp_pair()
    near = Link(sock, "far")
    with peer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.run, {})
            with pytest.raises(LinkClosed, match="stopped reading"):
                while True:
                    near.notify_nowait(Fault("x" * 100000))


async def test_too_many_requests_are_refused(monkeypatch):
    monkeypatch.setattr(link, "MAX_SERVED", 5)
    release = trio.Event()

    async def wait(_: KillAll) -> None:
        await release.wait()

    refused = []

    async def ask(near: Link) -> None:
        try:
            await near.request(KillAll())
        except RemoteError as error:
            refused.append(error.errno)

    async with links({}, {KillAll: wait}) as (near, _), trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(ask, near)
        while len(refused) < 3:
            await trio.lowlevel.checkpoint()
        release.set()
    assert refused == [EAGAIN] * 3


async def test_a_reply_that_cannot_be_sent_is_an_error():
    async with links({}, {KillAll: lambda _: FsReply(value=object())}) as (near, _):
        with pytest.raises(RemoteError, match="cannot be sent"):
            await near.request(KillAll())


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\0",
        b"\0\0\0\x03abc",
        codec.encode(Kind.NOTICE, 0, Heartbeat(1))[:-1] + b"\xc1",
    ],
)
async def test_garbage_ends_the_link_with_one_line(garbage, caplog):
    caplog.set_level(logging.INFO)
    sock, peer = tcp_pair()
    with peer:
        peer.sendall(garbage)
        assert (await Link(sock, "far").run({})).startswith("sent what")
    assert len(caplog.records) == 1


async def test_answers_that_nobody_waits_for_are_ignored():
    sock, peer = tcp_pair()
    near = Link(sock, "far")
    with peer:
        peer.sendall(codec.encode(Kind.REPLY, 77, Done()) + codec.encode_error(78, 1, "x") + codec.encode_cancel(79))
        peer.shutdown(socket.SHUT_WR)
        assert await near.run({}) == "the peer closed the connection"


async def test_run_after_close_ends_at_once():
    sock, peer = tcp_pair()
    with peer:
        near = Link(sock, "far")
        near.close("early")
        assert await near.run({}) == "early"
