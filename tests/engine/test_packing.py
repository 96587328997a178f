"""Packed parts: they come back as they were, or are a clean error; and when packing is of use."""

import os
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import packing
from engine.image import ImageError
from engine.packing import Packer, Sample
from engine.stream import Stream

pytestmark = pytest.mark.skipif(not packing.works(), reason="no liblz4.so.1")

SIZE = 1 << 20


class Always(Packer):
    """Packs whatever the link is like."""

    def _should(self, sock: socket.socket) -> bool:
        return True


@pytest.mark.parametrize("data", [bytes(SIZE), b"0123456789abcdef" * (SIZE // 16), os.urandom(SIZE), b"short"])
def test_parts_come_back(data: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        source, target = Stream(near, None, 10), Stream(far, None, 10)
        source.packer, target.packed = Always(), True
        sender = threading.Thread(target=lambda: [source.send_part(memoryview(bytearray(data))) for _ in range(3)])
        sender.start()
        for _ in range(3):
            part = bytearray(len(data))
            target.receive_part(memoryview(part))
            assert part == data
        sender.join()


@given(st.binary(max_size=300))
def test_garbage_is_a_clean_error(raw: bytes) -> None:
    left = memoryview(raw)

    def receive_into(view: memoryview) -> None:
        nonlocal left
        if len(left) < len(view):
            raise ImageError("it ends too early")
        view[:], left = left[: len(view)], left[len(view) :]

    part = bytearray(128)
    try:
        packing.receive(memoryview(part), receive_into)
    except ImageError:
        pass


@pytest.mark.parametrize(
    ("arrived", "full", "useful"),
    [(12_500_000, 0.0, True), (125_000_000, 0.0, True), (200_000_000, 0.0, False), (12_500_000, 0.6, False)],
)
def test_when_it_pays(arrived: int, full: float, useful: bool) -> None:
    """Over a second, at 300 MB/s: on slow links, but not where it is the receiver that is slow."""
    assert packing.is_worthwhile(Sample(0, 1, 0, 0), Sample(1, 1, arrived, full), 300e6) == useful
