"""What a node has to tell its master and does not know to be dealt with, in memory that outlives bpslave.

Reports are received from their sockets straight into it: a packet is in the socket or here, whenever this process may
be killed, and never in neither or both. The supervisor keeps the memory (a memfd) and the sockets for the next life.

    offset 0      where the first slot is that counts, and the last number that was given to what was told
    _BASE ...     slots: what it is, bytes of the packet, its number (0: it was not told yet); the packet

A slot that has been begun, whose packet is zeros, has not been filled; no packet begins with zeros. Without a slot that
counts all begins at _BASE again, and the memory of what was is given back.
"""

from __future__ import annotations

import enum
import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator
from errno import ENOBUFS
from typing import Final

from engine.jobspace import REPORT
from engine.jobwatch import PACKET_MAX, RECORD

SIZE: Final = 64 << 20
"""Bytes. Of address space: a master that is not behind leaves a few pages in use."""

_BASE: Final = mmap.PAGESIZE
_MUCH: Final = 16 * mmap.PAGESIZE  # bytes that are given back rather than written over
_FIRST: Final = struct.Struct("=Q")
_SIZE: Final = struct.Struct("=H")  # of a record of jobwatch's, at its beginning
_LAST_AT: Final = 8
_HEAD: Final = struct.Struct("=IIQ")
_NUMBER: Final = struct.Struct("=Q")
_NUMBER_AT: Final = 8  # in a slot
_VOID: Final = (1 << 64) - 1  # in place of the number: the slot counts no more


class Source(enum.IntEnum):
    """Who has sent a packet."""

    REPORT = 1  # nodeinit, or a placeholder: engine/jobspace.py
    EVENTS = 2  # jobwatch: engine/jobwatch.py


_LONGEST: Final = {Source.REPORT: REPORT.size, Source.EVENTS: PACKET_MAX}


class Slot:
    """One packet."""

    __slots__ = ("_at", "_memory", "source")

    def __init__(self, memory: mmap.mmap, at: int, source: Source) -> None:
        self._memory, self._at, self.source = memory, at, source

    @property
    def data(self) -> bytes:
        """The packet."""
        length = _HEAD.unpack_from(self._memory, self._at)[1]
        start = self._at + _HEAD.size
        return self._memory[start : start + length]

    @property
    def told(self) -> int:
        """Its number among all that was told; 0: it was not told."""
        return int(_HEAD.unpack_from(self._memory, self._at)[2])

    @told.setter
    def told(self, number: int) -> None:
        _NUMBER.pack_into(self._memory, self._at + _NUMBER_AT, number)

    def void(self) -> None:
        """It has been dealt with."""
        self.told = _VOID


class Spool:
    """All of it, oldest first."""

    def __init__(self, memory: int) -> None:
        """Take up what a life before has left.

        Args:
            memory: of `make_memory`; stays the caller's.
        """
        self._memory = mmap.mmap(memory, SIZE)
        self._slots: deque[Slot] = deque()
        at = max(_FIRST.unpack_from(self._memory)[0], _BASE)
        while (slot := self._find(at)) is not None:
            if slot.told != _VOID:
                self._slots.append(slot)
            at = self._after(slot)
        self._end = at
        self._clear(at, at + _HEAD.size + PACKET_MAX)

    def _find(self, at: int) -> Slot | None:
        source, length, _ = _HEAD.unpack_from(self._memory, at)
        if not source:
            return None
        slot = Slot(self._memory, at, Source(source))
        if not length:
            # It was received, or not, when that life ended.
            length = self._length(slot.source, at + _HEAD.size)
            if not length:
                return None
            _HEAD.pack_into(self._memory, at, source, length, 0)
        return slot

    def _length(self, source: Source, start: int) -> int:
        if source is Source.REPORT:
            return REPORT.size if any(self._memory[start : start + REPORT.size]) else 0
        length = 0
        while length < PACKET_MAX:
            (size,) = _SIZE.unpack_from(self._memory, start + length)
            if not size:
                break
            length += max(int(size), RECORD.size)
        return length

    def _clear(self, start: int, end: int) -> None:
        self._memory[start:end] = bytes(end - start)

    def _after(self, slot: Slot) -> int:
        length = _HEAD.unpack_from(self._memory, slot._at)[1]
        return slot._at + ((_HEAD.size + int(length) + 7) & ~7)

    @property
    def last(self) -> int:
        """The number of what was told last, whatever has become of that: 0 where nothing was."""
        return int(_NUMBER.unpack_from(self._memory, _LAST_AT)[0])

    @last.setter
    def last(self, number: int) -> None:
        _NUMBER.pack_into(self._memory, _LAST_AT, number)

    def __iter__(self) -> Iterator[Slot]:
        return iter(tuple(self._slots))

    def receive(self, sock: socket.socket, source: Source) -> Slot | None:
        """Take one packet from a socket; None at its end.

        Raises:
            BlockingIOError: there is none.
            OSError: ENOBUFS: too much has not been dealt with.
        """
        longest = _LONGEST[source]
        slot = self._begin(source, longest)
        start = self._end + _HEAD.size
        with memoryview(self._memory) as view, view[start : start + longest] as room:
            # The kernel is to find the pages there: a kill while it makes one would lose the packet.
            for page in range(0, longest, mmap.PAGESIZE):
                room[page] = 0
            try:
                length = sock.recv_into(room)
            except ConnectionResetError:
                length = 0
        if not length:
            return None
        return self._complete(slot, length)

    def put(self, data: bytes, source: Source) -> Slot:
        """Enter a packet that has come another way. Raises OSError as `receive`."""
        slot = self._begin(source, len(data))
        start = self._end + _HEAD.size
        self._memory[start : start + len(data)] = data
        return self._complete(slot, len(data))

    def _begin(self, source: Source, longest: int) -> Slot:
        if self._end + 2 * (_HEAD.size + PACKET_MAX) + longest > SIZE:
            raise OSError(ENOBUFS, os.strerror(ENOBUFS))
        _HEAD.pack_into(self._memory, self._end, source, 0, 0)
        return Slot(self._memory, self._end, source)

    def _complete(self, slot: Slot, length: int) -> Slot:
        _HEAD.pack_into(self._memory, self._end, slot.source, length, 0)
        self._slots.append(slot)
        self._end = self._after(slot)
        return slot

    def drop(self, slot: Slot) -> None:
        """It has been dealt with."""
        slot.void()
        if self._slots[0] is slot:
            self._slots.popleft()
        else:
            self._slots.remove(slot)
        if self._slots:
            _FIRST.pack_into(self._memory, 0, self._slots[0]._at)
        else:
            self._begin_again()

    def _begin_again(self) -> None:
        _FIRST.pack_into(self._memory, 0, self._end)
        start = _BASE
        if self._end - _BASE > _MUCH:
            start = self._end // mmap.PAGESIZE * mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_REMOVE, _BASE, start - _BASE)
        self._clear(start, self._end + _HEAD.size)  # with the slot that has been begun
        _FIRST.pack_into(self._memory, 0, _BASE)
        self._end = _BASE

    def __len__(self) -> int:
        return len(self._slots)


def make_memory() -> int:
    """Memory for a spool, as a descriptor. Raises OSError."""
    memory = os.memfd_create("bpslave-reports", os.MFD_CLOEXEC)
    os.ftruncate(memory, SIZE)
    return memory
