"""The codec: what goes in comes out, and nothing else comes out, whatever comes in."""

from __future__ import annotations

import dataclasses
import types
import typing

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpfs.errors import ProtocolError
from bpfs.wire import codec
from bpfs.wire.codec import Decoder, Frame, Kind
from bpfs.wire.messages import REGISTRY, Fault, Heartbeat, Hello, Message

INT = st.integers(-(1 << 63), (1 << 63) - 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | INT | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner).map(tuple) | st.dictionaries(st.text() | INT, inner),
    max_leaves=10,
)


def values_of(hint):
    if hint is typing.Any:
        return PLAIN
    simple = {int: INT, float: st.floats(allow_nan=False), str: st.text(), bytes: st.binary(), bool: st.booleans()}
    if hint in simple:
        return simple[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([st.none() if arg is types.NoneType else values_of(arg) for arg in args])
    assert origin is tuple, hint
    if args[-1] is Ellipsis:
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    return st.tuples(*(values_of(arg) for arg in args))


def instances(cls):
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{field.name: values_of(hints[field.name]) for field in dataclasses.fields(cls)})


MESSAGES = st.one_of([instances(cls) for cls in REGISTRY.values()])
FRAMES = st.tuples(st.sampled_from([Kind.NOTICE, Kind.REQUEST, Kind.REPLY]), st.integers(0, (1 << 64) - 1), MESSAGES)


@pytest.mark.parametrize("cls", REGISTRY.values(), ids=lambda cls: cls.__name__)
def test_messages_are_documented_and_frozen(cls: type[Message]):
    assert cls.__doc__ and cls.__doc__.startswith(("slave -> master", "master -> slave", "both"))
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]


@given(st.lists(FRAMES, max_size=5), st.data())
def test_round_trip_in_any_pieces(frames, data):
    stream = b"".join(codec.encode(kind, number, message) for kind, number, message in frames)
    decoder, found, position = Decoder(), [], 0
    while position < len(stream):
        step = data.draw(st.integers(1, len(stream) - position))
        found += decoder.feed(stream[position : position + step])
        position += step
    assert [(frame.kind, frame.id, frame.message) for frame in found] == frames


@given(st.integers(0, 1 << 40), st.integers(0, 200), st.text())
def test_errors_and_cancels(number, errno, text):
    found = list(Decoder().feed(codec.encode_error(number, errno, text) + codec.encode_cancel(number)))
    assert found == [Frame(Kind.ERROR, number, None, errno, text[:4000]), Frame(Kind.CANCEL, number)]


def drain(data: bytes) -> None:
    try:
        for frame in Decoder().feed(data):
            assert isinstance(frame, Frame)
    except ProtocolError as error:
        assert "\n" not in str(error)


@given(st.binary())
def test_garbage(data):
    drain(data)


@given(st.binary())
def test_garbage_in_a_frame(data):
    drain(len(data).to_bytes(4, "big") + data)


@given(PLAIN)
def test_any_msgpack(value):
    body = msgpack.packb(value)
    drain(len(body).to_bytes(4, "big") + body)


@given(st.integers(-2, 6), st.integers(-1, 70), st.lists(PLAIN, max_size=12))
def test_any_fields(kind, number, values):
    body = msgpack.packb((kind, 1, number, *values))
    drain(len(body).to_bytes(4, "big") + body)


@given(FRAMES, st.data())
def test_flipped_bytes(frame, data):
    stream = bytearray(codec.encode(*frame))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    drain(bytes(stream))


def test_lengths_are_bounded_before_they_are_believed():
    for length in (0, codec.LIMIT + 1, 0xFFFFFFFF):
        with pytest.raises(ProtocolError, match="announces"):
            list(Decoder().feed(length.to_bytes(4, "big")))
    with pytest.raises(ProtocolError, match="longer than"):
        codec.encode(Kind.NOTICE, 0, Hello(1, bytes(codec.LIMIT)))


def test_deep_nesting_is_refused():
    body = b"\x91" * 100000 + b"\xc0"
    with pytest.raises(ProtocolError):
        list(Decoder().feed(len(body).to_bytes(4, "big") + body))


def test_wrong_types_are_named():
    for values in ((True,), ("1",), (1.0,), (None,), ()):
        body = msgpack.packb((0, 0, Heartbeat.number, *values))
        with pytest.raises(ProtocolError, match="Heartbeat"):
            codec.decode(body)
    with pytest.raises(ProtocolError, match="unknown type 9999"):
        codec.decode(msgpack.packb((0, 0, 9999)))


def test_names_that_are_no_utf8_survive():
    name = b"\xff\xfe".decode(errors="surrogateescape")
    (frame,) = Decoder().feed(codec.encode(Kind.NOTICE, 0, Fault(name)))
    assert frame.message == Fault(name)
