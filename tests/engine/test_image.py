"""The image's codec: what was written comes back, anything else is a clean error."""

import dataclasses
import io
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import dump, image, lending
from engine.freeze import freeze
from tests.engine.moves import until


@pytest.fixture(scope="module")
def sample() -> bytes:
    """The image of a real process."""
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)"], os.environ)
    try:
        until(lambda: b"nanosleep" in Path(f"/proc/{pid}/wchan").read_bytes(), "its sleep")
        frozen = freeze(pid)
        try:
            out = io.BytesIO()
            inspection = dump.inspect(frozen)
            dump.write(inspection, dump.build(inspection), out.write)
            return out.getvalue()
        finally:
            frozen.release()
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def read_head(raw: bytes) -> image.Image:
    return image.read_head(io.BytesIO(raw).read)


def bodies(raw: bytes) -> tuple[bytes, bytes]:
    """Of META and STATE."""
    file = io.BytesIO(raw)
    return tuple(image.read_frame(file.read, (kind,), image.MAX_META)[1] for kind in (image.META, image.STATE))


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x03", b"\x91\xff", b"\x91\x63", b"\x91\xa1a"])  # -1, 99, "a"
def test_a_bad_wish_for_files_is_refused(sample: bytes, body: bytes) -> None:
    with pytest.raises(image.ImageError):
        lending.indices(body, read_head(sample))


def test_round_trip(sample: bytes) -> None:
    first = read_head(sample)
    again = read_head(image.head(first))
    assert dataclasses.asdict(first) == dataclasses.asdict(again)
    assert sum(length for _, length in image.runs_of(first)) == first.total
    end = io.BytesIO(sample[-(image.HEADER_SIZE + 8) :])
    assert image.read_frame(end.read, (image.END,), 100)[1] == first.total.to_bytes(8, "little")


@given(st.data())
def test_damaged_stream_is_a_clean_error(sample: bytes, data: st.DataObject) -> None:
    length = len(image.head(read_head(sample)))
    cut = data.draw(st.integers(0, length - 1))
    with pytest.raises(image.ImageError):
        read_head(sample[:cut])
    flipped = bytearray(sample[:length])
    flipped[cut] ^= data.draw(st.integers(1, 255))
    with pytest.raises(image.ImageError):
        read_head(bytes(flipped))


@given(st.binary(max_size=400))
def test_garbage_is_a_clean_error(raw: bytes) -> None:
    with pytest.raises(image.ImageError):
        read_head(raw)
    with pytest.raises(image.ImageError):
        image.decode(raw)


@given(st.data())
def test_wrong_fields_are_a_clean_error(sample: bytes, data: st.DataObject) -> None:
    meta, state = bodies(sample)
    which = data.draw(st.booleans())
    plain = image.msgpack.unpackb(state if which else meta, strict_map_key=False)
    name = data.draw(st.sampled_from(sorted(plain)))
    plain[name] = data.draw(st.sampled_from([None, -1, b"", b"x", [], [[]], {}, "x", 1 << 63]))
    forged = image.msgpack.packb(plain)
    try:
        found = image.decode(meta if which else forged)
        image.add_state(found, forged if which else state)
    except image.ImageError:
        return
    assert type(getattr(found, name)) is type(plain[name])
