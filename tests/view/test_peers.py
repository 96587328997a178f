"""Objects from node to node: who gets one, and from whom."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpfs.view.peers import ABREAST, SECRET, Giver, Holders, take
from bpfs.view.store import Store

DATA = os.urandom(300_000)
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def giver(tmp_path: Path) -> Giver:
    """The door of a node that has one object."""
    store = Store(tmp_path, 0)
    os.close(store.put(DIGEST, len(DATA), iter([DATA])))
    made = Giver(store)
    with pair() as (near, _):
        made.open(near)
        made.open(near)  # one door, however many streams
    return made


class pair:
    """A TCP connection with itself."""

    def __enter__(self) -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._near = socket.create_connection(listener.getsockname())
            self._far, _ = listener.accept()
        return self._near, self._far

    def __exit__(self, *_: object) -> None:
        self._near.close()
        self._far.close()


def test_who_knows_the_secret_gets_what_is_there(giver):
    peer = ("127.0.0.1", giver.port, giver.secret)
    assert b"".join(bytes(part) for part in take(peer, DIGEST, len(DATA))) == DATA
    for digest, size in ((DIGEST, len(DATA) - 1), ("0" * 64, 10), ("../" + "0" * 61, 10)):
        with pytest.raises(OSError):
            next(take(peer, digest, size))


STRANGERS = {"nothing": b"", "too little": b"x" * 10, "another secret": bytes(SECRET) + DIGEST.encode()}


@pytest.mark.parametrize("said", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_gets_nothing(giver, said):
    with socket.create_connection(("127.0.0.1", giver.port)) as sock:
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""


@pytest.fixture
def streams() -> Iterator[list[socket.socket]]:
    """The master's ends of streams to three nodes."""
    with pair() as (_, one), pair() as (_, two), pair() as (_, three):
        yield [one, two, three]


def test_others_are_named_while_they_are_there(streams):
    one, two, three = streams
    holders = Holders()
    for number, stream in enumerate((one, two)):
        holders.announce(stream, 1000 + number, bytes([number]) * SECRET)
    holders.has(three, DIGEST)  # of whom nobody knows where he gives
    assert holders.others(one, DIGEST) == []
    holders.has(one, DIGEST)
    assert holders.others(two, DIGEST) == holders.others(three, DIGEST) == [("127.0.0.1", 1000, bytes(SECRET))]
    holders.announce(three, 1000, bytes(SECRET))  # another stream of the same node
    assert holders.others(three, DIGEST) == []
    holders.gone(one)
    assert holders.others(two, DIGEST)
    holders.gone(three)
    assert holders.others(two, DIGEST) == []


def test_who_comes_while_an_object_is_sent_to_many_waits_for_one_of_them(streams):
    one, two, _ = streams
    holders = Holders()
    holders.announce(one, 1000, b"1" * SECRET)
    for _ in range(ABREAST):
        assert holders.others(two, DIGEST) == []
    told: list[object] = []
    late = threading.Thread(target=lambda: told.append(holders.others(two, DIGEST)))
    late.start()
    holders.has(one, DIGEST)
    late.join()
    assert told == [[("127.0.0.1", 1000, b"1" * SECRET)]]
    for _ in range(ABREAST):
        holders.sent(DIGEST)
