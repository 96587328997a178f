"""The other end of a job's stream when its ghost is gone: takes all output, drops it, and has no input."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from enum import IntEnum
from typing import Final

import trio

from bpfs.wire.mux import ChanKind, Channel

OUTPUT_WINDOW: Final = 256 << 10  # bytes, as a ghost grants (mux.h)
_CHUNK: Final = 1 << 16
_FRAME: Final = struct.Struct("<BBxxI")
_WORD: Final = struct.Struct("<I")


class _Frame(IntEnum):
    """The frames that matter here, of enum frame_type in mux.h."""

    DATA = 1
    EOF = 2
    WINDOW = 3
    PENDING = 5
    WANT = 6
    SYNC = 20
    SYNCED = 21


class NoGhost:
    """The other end of a job's stream, when its ghost is gone."""

    def __init__(self, stream: trio.SocketStream, channels: list[Channel]) -> None:
        self._stream = stream
        self._channels = {channel.number: channel for channel in channels}
        self._words = {_Frame.DATA: self._more_room, _Frame.WANT: self._at_its_end, _Frame.SYNC: self._synced}

    async def run(self) -> None:
        """Until iorelay closes it: the job has closed all that it wrote to."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with self._stream:
                await self._stream.send_all(b"".join(map(_begin, self._channels.values())))
                await self._serve()

    async def _serve(self) -> None:
        data = bytearray()
        while more := await self._stream.receive_some(_CHUNK):
            data += more
            answer = b""
            while len(data) >= _FRAME.size:
                kind, number, length = _FRAME.unpack_from(data)
                if len(data) < _FRAME.size + length:
                    break
                if kind in self._words:
                    answer += self._words[_Frame(kind)](number, bytes(data[_FRAME.size : _FRAME.size + length]))
                del data[: _FRAME.size + length]
            await self._stream.send_all(answer)

    def _more_room(self, number: int, data: bytes) -> bytes:
        return _frame(_Frame.WINDOW, number, len(data))

    def _at_its_end(self, number: int, _: bytes) -> bytes:
        return _frame(_Frame.EOF, number, 0) + _frame(_Frame.PENDING, number)

    def _synced(self, number: int, data: bytes) -> bytes:
        return _frame(_Frame.SYNCED, number, _WORD.unpack_from(data)[0])


def _begin(channel: Channel) -> bytes:
    frames = b""
    if channel.access != os.O_RDONLY:
        frames += _frame(_Frame.WINDOW, channel.number, OUTPUT_WINDOW)
    if channel.kind is ChanKind.TTY:
        frames += _frame(_Frame.PENDING, channel.number)
    elif channel.access != os.O_WRONLY:
        frames += _frame(_Frame.EOF, channel.number, 0)
    return frames


def _frame(kind: _Frame, number: int, value: int | None = None) -> bytes:
    payload = b"" if value is None else _WORD.pack(value)
    return _FRAME.pack(kind, number, len(payload)) + payload
