"""Reports that outlive who has received them: what one spool has, the next one over the same memory finds."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Iterator

import pytest

from bpfs.slave.spool import Source, Spool, make_memory
from engine.jobspace import REPORT
from engine.jobwatch import RECORD


@pytest.fixture
def memory() -> Iterator[int]:
    fd = make_memory()
    yield fd
    os.close(fd)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.setblocking(False)
    with one, other:
        yield one, other


def report(number: int) -> bytes:
    return REPORT.pack(1, number, 1, 1, 0, 0, 0, 0, 0, 0, 0)


def events(number: int) -> bytes:
    size = RECORD.size + 4 * (number % 700)
    return RECORD.pack(size, 1, 83, number, 1, 1, 1, 0, 0, 0, 0, 0, b"name").ljust(size, b"\0") * (1 + number % 3)


def packet(number: int) -> tuple[Source, bytes]:
    return (Source.EVENTS, events(number)) if number % 3 == 0 else (Source.REPORT, report(number))


def contents(spool: Spool) -> list[tuple[Source, bytes, int]]:
    return [(slot.source, slot.data, slot.told) for slot in spool]


def test_the_next_one_finds_what_is_left(memory, ends):
    """Whatever was dropped in whatever order, and however often all was."""
    chance, (ours, theirs) = random.Random(4), ends
    spool, kept, number = Spool(memory), [], 0
    for _ in range(3000):
        what = chance.random()
        if what < 0.5:
            number += 1
            source, data = packet(number)
            theirs.send(data)
            slot = spool.receive(ours, source)
            assert slot is not None and slot.data == data
            kept.append(slot)
        elif what < 0.9 and kept:
            slot = kept.pop(chance.choice([0, 0, 0, -1]))
            spool.drop(slot)
        elif what < 0.95:
            for slot in kept:
                spool.last += 1
                slot.told = spool.last
        else:
            before, last = contents(spool), spool.last
            with pytest.raises(BlockingIOError):
                spool.receive(ours, chance.choice([Source.REPORT, Source.EVENTS]))
            spool = Spool(memory)
            assert (contents(spool), spool.last) == (before, last)
            kept = list(spool)


def test_a_report_is_in_the_socket_or_in_memory_whenever_its_reader_is_killed(memory, ends):
    """A child receives, and is killed at some moment; then the next one does."""
    ours, theirs = ends
    sent = 0
    for _ in range(40):
        child = os.fork()
        if child == 0:
            try:
                spool = Spool(memory)
                while True:
                    try:
                        spool.receive(ours, packet(sum(1 for _ in spool) + 1)[0])
                    except BlockingIOError:
                        continue
            finally:
                os._exit(1)
        for _ in range(20):
            sent += 1
            theirs.send(packet(sent)[1])
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    spool = Spool(memory)
    while len(spool) < sent:
        spool.receive(ours, packet(len(spool) + 1)[0])
    assert [(slot.source, slot.data) for slot in spool] == [packet(number) for number in range(1, sent + 1)]


def test_the_end_of_a_socket(memory, ends):
    ours, theirs = ends
    theirs.close()
    assert Spool(memory).receive(ours, Source.REPORT) is None
