"""The handshake: the key is proved both ways, and nothing but the key gets anybody in."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import trio

from bpfs.errors import ConfigError, LinkClosed, ProtocolError
from bpfs.wire import handshake
from bpfs.wire.handshake import RefusedByMaster
from bpfs.wire.link import Link
from bpfs.wire.messages import VERSION, Challenge, Heartbeat, Hello, Join, Refused, Welcome
from tests.wire.pairs import tcp_pair

KEY = b"k" * 32
JOIN = Join(b"", 3, (), "n3", "6.1", bytes(16), False, b"", "x86_64")
WELCOME = Welcome(3, 30.0, 10.0, 1000, 1999, "/bpfs", bytes(16), bytes(16), 1, 2, "wait", 30.0)


def pair() -> tuple[Link, Link]:
    near, far = tcp_pair()
    return Link(near, "master"), Link(far, "slave")


async def master(link: Link, key: bytes, answer=WELCOME) -> Join:
    """What a master does, up to its answer."""
    try:
        hello = await link.receive()
        assert isinstance(hello, Hello)
        join = await handshake.admit(link, key, hello)
        await link.notify(answer)
        return join
    except BaseException:
        link.close("dropped")
        raise


async def test_both_know_the_key():
    slave, link = pair()
    async with trio.open_nursery() as nursery:
        joins = []
        nursery.start_soon(lambda: _into(joins, master(link, KEY)))
        assert await handshake.enter(slave, KEY, JOIN) == WELCOME
    assert replace(joins[0], proof=b"") == JOIN
    slave.close("")
    link.close("")


async def _into(found, work):
    found.append(await work)


async def test_a_slave_with_a_wrong_key_is_not_admitted_and_knows_it():
    slave, link = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_refuses, link, "does not know the cluster key")
        with pytest.raises(ProtocolError, match="does not know the cluster key"):
            await handshake.enter(slave, b"x" * 32, JOIN)
        slave.close("")


async def _refuses(link: Link, match: str):
    with pytest.raises((ProtocolError, LinkClosed), match=f"{match}|another cluster key|closed the connection"):
        await master(link, KEY)


async def test_a_forged_proof_is_not_admitted():
    slave, link = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_refuses, link, "does not know the cluster key")
        await slave.notify(Hello(VERSION, os.urandom(32)))
        challenge = await slave.receive()
        assert isinstance(challenge, Challenge)
        # The master's own proof, played back to it: the role makes it useless.
        await slave.notify(replace(JOIN, proof=challenge.proof))
        with pytest.raises(LinkClosed):
            await slave.receive()


async def test_a_recorded_handshake_cannot_be_replayed():
    slave, link = pair()
    sent = []
    original = slave.notify

    async def recording(message):
        sent.append(message)
        await original(message)

    slave.notify = recording  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(master, link, KEY)
        await handshake.enter(slave, KEY, JOIN)
    replayer, link = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_refuses, link, "does not know the cluster key")
        for message in sent:
            await replayer.notify(message)
        assert isinstance(await replayer.receive(), Challenge)
        with pytest.raises(LinkClosed):
            await replayer.receive()


async def test_a_false_master_learns_nothing_from_a_slave():
    slave, link = pair()
    async with trio.open_nursery() as nursery:

        async def false_master():
            hello = await link.receive()
            assert isinstance(hello, Hello)
            await link.notify(Challenge(VERSION, os.urandom(32), os.urandom(32)))
            with pytest.raises(LinkClosed):
                await link.receive()

        nursery.start_soon(false_master)
        with pytest.raises(ProtocolError, match="does not know the cluster key"):
            await handshake.enter(slave, KEY, JOIN)
        slave.close("")


@pytest.mark.parametrize("nonce", [b"", b"short", bytes(31), bytes(33)])
async def test_bad_nonces(nonce):
    slave, link = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_refuses, link, "bad nonce")
        await slave.notify(Hello(VERSION, nonce))
        with pytest.raises(LinkClosed):
            await slave.receive()


async def test_another_version_is_told():
    slave, link = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_refuses, link, "speaks version")
        await slave.notify(Hello(VERSION + 1, bytes(32)))
        answer = await slave.receive()
        assert isinstance(answer, Refused) and "version" in answer.reason
        slave.close("")


@pytest.mark.parametrize("parked", [True, False])
async def test_a_refusal_is_told(parked):
    slave, link = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(master, link, KEY, Refused("no room", parked))
        with pytest.raises(RefusedByMaster, match="no room") as caught:
            await handshake.enter(slave, KEY, JOIN)
    assert caught.value.parked is parked


async def test_other_messages_are_no_handshake():
    slave, link = pair()
    async with trio.open_nursery() as nursery:

        async def other():
            await link.receive()
            await link.notify(Heartbeat(1))

        nursery.start_soon(other)
        with pytest.raises(ProtocolError, match="answered with Heartbeat"):
            await handshake.enter(slave, KEY, JOIN)


async def test_nothing_long_is_read_before_the_proof():
    slave, link = pair()
    await slave.notify(Hello(VERSION, bytes(9000)))
    with pytest.raises(ProtocolError, match="announces a frame"):
        await link.receive()


def test_key_files(tmp_path):
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match="No such file"):
        handshake.read_key(path)
    path.write_bytes(handshake.make_key() + b"\n")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others"):
        handshake.read_key(path)
    path.chmod(0o600)
    assert len(handshake.read_key(path)) == 64
    path.write_text("short\n")
    with pytest.raises(ConfigError, match="shorter than 16"):
        handshake.read_key(path)
