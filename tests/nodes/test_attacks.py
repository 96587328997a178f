"""Strangers at the master's port: each is dropped with one line in the log, and the nodes never notice."""

from __future__ import annotations

import logging
import os

import pytest
import trio
import trio.testing

from bpfs.errors import LinkClosed, ProtocolError
from bpfs.master import listener
from bpfs.wire import codec, streams
from bpfs.wire.codec import Kind
from bpfs.wire.messages import VERSION, Heartbeat, Hello, Join, Ready, StreamOpen
from tests.nodes.simslave import SimulatedSlave, master


def frame(message) -> bytes:
    return codec.encode(Kind.NOTICE, 0, message)


STRANGERS = {
    "http": b"GET / HTTP/1.0\r\n\r\n",
    "random bytes": os.urandom(4096),
    "zeros": bytes(4096),
    "a giant length": b"\xff\xff\xff\xff",
    "a length beyond the handshake's": b"\0\0\xff\xff" + bytes(100),
    "no array": b"\0\0\0\x01\x01",
    "half a frame, then the end": frame(Hello(VERSION, bytes(32)))[:20],
    "a join without a hello": frame(Join(b"", 0, (), "x", "y", bytes(16), False, b"", "x86_64")),
    "a heartbeat": frame(Heartbeat(1)),
    "ready at once": frame(Ready(1, True, 0)),
    "a request": codec.encode(Kind.REQUEST, 1, Hello(VERSION, bytes(32))),
    "a bad nonce": frame(Hello(VERSION, b"1")),
    "another version": frame(Hello(VERSION + 7, bytes(32))),
    "a forged proof": frame(Hello(VERSION, bytes(32)))
    + frame(Join(bytes(32), 0, (), "x", "y", bytes(16), False, b"", "x86_64")),
    "a stream that nobody expects": frame(StreamOpen(bytes(32))) + b"data",
}


async def _wait_dropped(sock) -> None:
    """Waits until the other side has closed."""
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            if not sock.recv(65536):
                return
        except BlockingIOError:
            continue
        except ConnectionResetError:
            return


@pytest.mark.parametrize("name", STRANGERS)
async def test_strangers(name, nursery, caplog):
    caplog.set_level(logging.WARNING)
    async with master() as it:
        nursery.start_soon(SimulatedSlave(it.port, number=0).run)
        await it.wait_state(0, "up")
        version = it.cluster.nodes.version
        sock = await streams.connect("127.0.0.1", it.port)
        with sock:
            sock.sendall(STRANGERS[name])
            if "the end" in name:
                sock.shutdown(1)
            await _wait_dropped(sock)
        while not caplog.records:
            await trio.sleep(0.01)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        line = caplog.records[0].getMessage()
        assert "was dropped" in line and "\n" not in line and len(line) < 400
        assert it.state(0) == "up" and it.cluster.nodes.version == version
        nursery.cancel_scope.cancel()


async def test_silence_and_half_frames_are_dropped_in_time(monkeypatch, caplog):
    monkeypatch.setattr(listener, "TIMEOUT", 0.2)
    async with master() as it:
        for part in (b"", b"\0", frame(Hello(VERSION, bytes(32)))[:-1], frame(Hello(VERSION, bytes(32)))):
            caplog.clear()
            with await streams.connect("127.0.0.1", it.port) as sock:
                sock.sendall(part)
                await _wait_dropped(sock)
            while not caplog.records:
                await trio.sleep(0.01)
            (record,) = caplog.records
            assert "no proof of the cluster key within" in record.getMessage()


async def test_a_wrong_key(caplog):
    async with master() as it:
        slave = SimulatedSlave(it.port, number=0, key=b"another key, long enough")
        with pytest.raises((ProtocolError, LinkClosed)):
            await slave.run()
        while not caplog.records:
            await trio.sleep(0.01)
        assert len(caplog.records) == 1 and it.cluster.nodes.find(0) is None


async def test_many_silent_strangers_do_not_keep_a_slave_out(nursery, monkeypatch):
    async with master() as it:
        socks = [await streams.connect("127.0.0.1", it.port) for _ in range(200)]
        try:
            nursery.start_soon(SimulatedSlave(it.port, number=0).run)
            await it.wait_state(0, "up")
        finally:
            for sock in socks:
                sock.close()
        nursery.cancel_scope.cancel()


async def test_more_strangers_than_allowed_are_turned_away(monkeypatch, caplog):
    monkeypatch.setattr(listener, "MAX_STRANGERS", 3)
    async with master() as it:
        socks = [await streams.connect("127.0.0.1", it.port) for _ in range(3)]
        await trio.testing.wait_all_tasks_blocked()
        with await streams.connect("127.0.0.1", it.port) as sock:
            await _wait_dropped(sock)
        assert "too many connections" in caplog.text
        for sock in socks:
            sock.close()


async def test_streams_need_their_token_and_only_once():
    async with master() as it:
        with it.cluster.streams.expect() as stream:
            with await streams.open_stream("127.0.0.1", it.port, stream.token) as sock:
                sock.sendall(b"first")
                got = await stream.wait_connected(10)
                with got:
                    await trio.lowlevel.wait_readable(got)
                    assert got.recv(100) == b"first"
            with await streams.open_stream("127.0.0.1", it.port, stream.token) as sock:
                await _wait_dropped(sock)
        with it.cluster.streams.expect() as stream:
            pass
        with await streams.open_stream("127.0.0.1", it.port, stream.token) as sock:
            await _wait_dropped(sock)
