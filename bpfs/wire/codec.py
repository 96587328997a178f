"""Frames to bytes and back; no I/O, nothing but values.

A frame is a u32 (big-endian) length and that many bytes of msgpack: an array ``[kind, id, number, field…]``. Every
length is bounded before it is believed, every field is checked against its declared type, and whatever is wrong
comes out as `ProtocolError`.
"""

from __future__ import annotations

import enum
import struct
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import msgpack

from bpfs.errors import ProtocolError
from bpfs.wire.messages import REGISTRY, Message

LIMIT = 1 << 20
"""Bytes of the longest frame: the largest write to a control file plus room."""

HANDSHAKE_LIMIT = 8192
"""Bytes of the longest frame that a peer may send before it has proved the key."""

_LENGTH = struct.Struct(">I")
HEADER = _LENGTH.size


class Kind(enum.IntEnum):
    """What a frame is for."""

    NOTICE = 0  # a message that wants no answer; id 0
    REQUEST = 1  # a message that wants one; id chosen by the sender
    REPLY = 2  # the answer to request `id`
    ERROR = 3  # request `id` failed: fields errno, sentence; number 0
    CANCEL = 4  # whoever asked `id` no longer waits; number 0, no fields


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame; `message` for notices, requests and replies, `errno` and `text` for errors."""

    kind: Kind
    id: int
    message: Message | None = None
    errno: int = 0
    text: str = ""


# -- checks: one function a type, made once --------------------------------------------------------

_Check = Callable[[Any], bool]
_U64 = 1 << 64


def _is_float(value: Any) -> bool:
    return type(value) in (float, int)


def _checker(hint: Any) -> _Check:
    if hint is Any:
        return lambda value: True
    if hint is float:
        return _is_float
    if hint in (int, str, bytes, bool):
        return lambda value: type(value) is hint
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [_checker(arg) for arg in args if arg is not types.NoneType]
        return lambda value: value is None or any(check(value) for check in inner)
    if origin is tuple and args[-1] is Ellipsis:
        each = _checker(args[0])
        return lambda value: type(value) is tuple and all(each(item) for item in value)
    if origin is tuple:
        parts = [_checker(arg) for arg in args]
        return lambda value: (
            type(value) is tuple and len(value) == len(parts) and all(c(v) for c, v in zip(parts, value, strict=True))
        )
    raise TypeError(f"no check for fields of type {hint}")


def _checks(cls: type[Message]) -> tuple[tuple[str, _Check], ...]:
    hints = typing.get_type_hints(cls)
    return tuple((field.name, _checker(hints[field.name])) for field in fields(typing.cast(Any, cls)))


_CHECKS = {number: _checks(cls) for number, cls in REGISTRY.items()}


# -- encoding --------------------------------------------------------------------------------------


def _pack(values: tuple[Any, ...]) -> bytes:
    try:
        body: bytes = msgpack.packb(values, unicode_errors="surrogateescape")
    except (ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"cannot be sent: {error}") from None
    if len(body) > LIMIT:
        raise ProtocolError(f"a frame of {len(body)} bytes is longer than {LIMIT}")
    return _LENGTH.pack(len(body)) + body


def encode(kind: Kind, frame_id: int, message: Message) -> bytes:
    """The bytes of a notice, request or reply.

    Raises:
        ProtocolError: too long, or a field holds what cannot be sent.
    """
    number = message.number
    return _pack((int(kind), frame_id, number, *(getattr(message, name) for name, _ in _CHECKS[number])))


def encode_error(frame_id: int, errno: int, text: str) -> bytes:
    """The bytes of an error answer; the text is cut at 4,000 characters."""
    return _pack((int(Kind.ERROR), frame_id, 0, errno, text[:4000]))


def encode_cancel(frame_id: int) -> bytes:
    """The bytes that say: nobody waits for the answer to `frame_id` any more."""
    return _pack((int(Kind.CANCEL), frame_id, 0))


# -- decoding --------------------------------------------------------------------------------------


def frame_length(header: bytes, limit: int = LIMIT) -> int:
    """The length that a frame's first `HEADER` bytes announce.

    Raises:
        ProtocolError: zero or beyond the limit.
    """
    length: int = _LENGTH.unpack(header)[0]
    if not 0 < length <= limit:
        raise ProtocolError(f"announces a frame of {length} bytes")
    return length


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _unpack(body: bytes | memoryview) -> tuple[Any, ...]:
    try:
        values = msgpack.unpackb(
            body,
            use_list=False,
            strict_map_key=False,
            unicode_errors="surrogateescape",
            ext_hook=_no_extension,
            timestamp=0,
        )
    # Whatever msgpack raises on nonsense (its own family, ValueError, TypeError for maps with odd keys): it is
    # nonsense.
    except Exception as error:
        raise ProtocolError(f"is no msgpack: {type(error).__name__} {error}"[:200]) from None
    if type(values) is not tuple or len(values) < 3 or any(type(value) is not int for value in values[:3]):
        raise ProtocolError("is no frame")
    return values


def decode(body: bytes | memoryview) -> Frame:
    """A frame from its body (without the length).

    Raises:
        ProtocolError: it is none.
    """
    kind_number, frame_id, number, *values = _unpack(body)
    try:
        kind = Kind(kind_number)
    except ValueError:
        raise ProtocolError(f"is of unknown kind {kind_number}") from None
    if not 0 <= frame_id < _U64:
        raise ProtocolError(f"has id {frame_id}")
    if kind is Kind.CANCEL:
        return Frame(kind, frame_id)
    if kind is Kind.ERROR:
        if len(values) != 2 or type(values[0]) is not int or type(values[1]) is not str:
            raise ProtocolError("is no error answer")
        return Frame(kind, frame_id, None, values[0], values[1])
    return Frame(kind, frame_id, _message(number, values))


def _message(number: int, values: list[Any]) -> Message:
    cls, checks = REGISTRY.get(number), _CHECKS.get(number)
    if cls is None or checks is None:
        raise ProtocolError(f"is of unknown type {number}")
    if len(values) != len(checks):
        raise ProtocolError(f"is a {cls.__name__} of {len(values)} fields, not {len(checks)}")
    for value, (name, check) in zip(values, checks, strict=True):
        if not check(value):
            raise ProtocolError(f"is a {cls.__name__} with a wrong {name}")
    return cls(*values)


class Decoder:
    """Takes bytes as they come and gives frames as they are complete."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with `data`.

        Raises:
            ProtocolError: the stream is broken for good.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= HEADER:
                length = frame_length(bytes(buffer[start : start + HEADER]), self.limit)
                end = start + HEADER + length
                if len(buffer) < end:
                    break
                body = bytes(buffer[start + HEADER : end])
                start = end
                yield decode(body)
        finally:
            del buffer[:start]
