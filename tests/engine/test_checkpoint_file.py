"""Checkpoint files: what is read is what was written, and nothing else is ever believed."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import dump
from engine import image as img
from engine.checkpoint import CHUNK, Chain, Checkpoint, Writer, chunks, merge
from engine.freeze import freeze


def _nothing_beside(name: bytes) -> int:
    raise FileNotFoundError(2, "No such file or directory", os.fsdecode(name))


def _dumped(pid: int) -> list[bytes]:
    """An image as it comes over a stream: META, STATE, pages, END."""
    frozen = freeze(pid)
    parts: list[bytes] = []
    try:
        inspection = dump.inspect(frozen)
        dump.write(inspection, dump.build(inspection), lambda data: parts.append(bytes(data)))
    finally:
        frozen.release()
    return parts


def _write(parts: list[bytes], parent: tuple[Checkpoint, bytes] | None = None) -> bytes:
    fd = os.memfd_create("ck")
    writer = Writer(fd, parent)
    writer.begin(img.read_head(io.BytesIO(parts[0] + parts[1]).read))
    for part in parts[2:-1]:
        writer.add(part)
    size = writer.finish()
    data = os.pread(fd, size + 1, 0)
    assert len(data) == size
    os.close(fd)
    return data


def _file(data: bytes) -> int:
    fd = os.memfd_create("ck")
    os.write(fd, data)
    return fd


@pytest.fixture(scope="module")
def parts() -> Iterator[list[bytes]]:
    process = subprocess.Popen(["/usr/bin/sleep", "100"])
    try:
        yield _dumped(process.pid)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def whole(parts: list[bytes]) -> bytes:
    return _write(parts)


def _pages(chain: Chain) -> bytes:
    try:
        return b"".join(data for _, data in chain.pages())
    finally:
        chain.close()


def test_what_was_written_is_read(parts, whole):
    assert _pages(Chain(_file(whole), _nothing_beside)) == b"".join(parts[2:-1])


def test_a_chunk_ends_at_every_multiple():
    runs = [(CHUNK - 4096, 3 * CHUNK), (10 * CHUNK, 4096)]
    found = list(chunks(runs))
    assert sum(length for _, length in found) == 3 * CHUNK + 4096
    assert found == [
        (CHUNK - 4096, 4096), (CHUNK, CHUNK), (2 * CHUNK, CHUNK), (3 * CHUNK, CHUNK - 4096), (10 * CHUNK, 4096)
    ]  # fmt: skip


def test_an_image_on_another_has_what_changed_only_and_merges_to_the_same(parts, whole):
    changed = [*parts[:2], b"\xff" * 4096 + parts[2][4096:], *parts[3:]]
    base = Checkpoint(_file(whole))
    small = _write(changed, (base, b"base"))
    base.close()
    written = Checkpoint(_file(small))
    assert sum(offset >= 0 for offset in written.offsets) == 1
    written.close()
    beside: Callable[[bytes], int] = lambda name: _file(whole)  # noqa: E731
    assert _pages(Chain(_file(small), beside)) == b"".join(changed[2:-1])
    chain, fd = Chain(_file(small), beside), os.memfd_create("merged")
    merge(chain, fd)
    chain.close()
    assert _pages(Chain(fd, _nothing_beside)) == b"".join(changed[2:-1])


def test_another_image_of_that_name_is_not_taken_for_it(parts, whole):
    base = Checkpoint(_file(whole))
    small = _write(parts, (base, b"base"))
    base.close()
    other = _write(parts)
    with pytest.raises(img.ImageError, match="not the image that it builds on"):
        Chain(_file(small), lambda name: _file(other))
    with pytest.raises(FileNotFoundError):
        Chain(_file(small), _nothing_beside)
    with pytest.raises(img.ImageError):
        Chain(_file(small), lambda name: _file(small))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_or_a_missing_end_is_never_believed(whole, data):
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        bad = whole[:at]
    else:
        bad = whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :]
    with pytest.raises(OSError) as caught:
        _pages(Chain(_file(bad), _nothing_beside))
    assert caught.value.errno == 74


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=300), kind=st.integers(0, 20))
def test_hostile_frames_with_right_checksums(body, kind):
    with pytest.raises(OSError):
        _pages(Chain(_file(img.frame(16, body) + img.frame(kind, body) + img.frame(18, body[:8])), _nothing_beside))
