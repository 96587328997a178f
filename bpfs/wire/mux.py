"""Control packets of ghost and iorelay, and the channels of a job: the mirror of bpfs/procs/csrc/mux.h.

One packet is one message on an AF_UNIX SEQPACKET socket. A test compares it with the C header.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from errno import E2BIG
from typing import Any, Final, NamedTuple

from bpfs.errors import BpfsError, ProtocolError

_HEAD: Final = struct.Struct("<Iiiii4xQ")
_RECORD: Final = struct.Struct("<BBBB")
BIRTH: Final = struct.Struct("<IIBB2x16s")
HEAD_BYTES: Final = _HEAD.size
RECORD_BYTES: Final = _RECORD.size
MAX_TEXT: Final = 4064
MAX_PACKET: Final = HEAD_BYTES + MAX_TEXT
STREAM_BUFFER: Final = 4 << 20
MAX_CHANS: Final = 64
MAX_FDS: Final = 64


class Ctl(IntEnum):
    """Types of control packets."""

    NAME = 1
    STREAM = 2
    HOLD = 3
    RESUME = 4
    EXIT = 5
    KILLED = 6
    STOP = 7
    CONT = 8
    PUMP = 9
    FORK = 10
    REAP = 11
    IDS = 12
    ARGUMENTS = 13
    KEEP = 14
    SEND = 15
    STRIKE = 18
    ADOPT = 17
    SEEN = 16
    READY = 32
    SIGNAL = 33
    HELD = 34
    STOPPED = 35
    CONTINUED = 36
    STREAM_LOST = 37
    PUMPED = 38
    BORN = 39
    CHILD = 40
    INTERRUPTED = 41
    ADOPTED = 42
    STRUCK = 43
    CHILD_STOPPED = 44
    ATTACH = 64
    DETACH = 65
    FRONTED = 66
    LIST = 67
    ENDED = 96
    LOST = 97
    FRONT = 98
    HAS = 99
    LISTED = 100


class ChanKind(IntEnum):
    """What a channel is on the master; it decides what stands for it on a node."""

    TTY = 1  # a pseudo-terminal
    PIPE = 2  # a pipe, or a socket pair where it is read and written
    SOCKET = 3  # a socket pair
    FILE = 4  # a pipe; what the job left unread is given back by seeking


_KINDS: Final = {"tty": ChanKind.TTY, "socket": ChanKind.SOCKET, "file": ChanKind.FILE}


class Packet(NamedTuple):
    """One control packet; what a, b, c, d and value mean is said in mux.h."""

    type: int
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0
    value: int = 0
    text: bytes = b""

    def pack(self) -> bytes:
        """Raises BpfsError E2BIG where the text is too long."""
        if len(self.text) > MAX_TEXT:
            raise BpfsError(E2BIG, f"a control packet takes {MAX_TEXT} bytes of text, not {len(self.text)}")
        return _HEAD.pack(*self[:6]) + self.text


def unpack(data: bytes) -> Packet:
    """Raises ProtocolError where it is shorter than a packet's head."""
    if len(data) < HEAD_BYTES:
        raise ProtocolError(f"a control packet of {len(data)} bytes")
    kind, a, b, c, d, value = _HEAD.unpack_from(data)
    return Packet(kind, a, b, c, d, value, data[HEAD_BYTES:])


@dataclass(frozen=True, slots=True)
class Channel:
    """One open file of a job that is relayed; all its terminals are one channel, for they are one terminal.

    `access` is O_RDONLY, O_WRONLY or O_RDWR; `externals` the engine's External maps
    (engine/descriptors/external.py).
    """

    number: int
    kind: ChanKind
    access: int
    externals: tuple[Mapping[str, Any], ...]

    @property
    def fds(self) -> list[int]:
        """The job's descriptor numbers of it."""
        return sorted(fd for external in self.externals for fd in external["fds"])

    @property
    def two_way(self) -> bool:
        """Whether a socket pair stands for it."""
        return self.kind is not ChanKind.TTY and self.access == os.O_RDWR


def channels_of(externals: Iterable[Mapping[str, Any]]) -> list[Channel]:
    """The channels of a process. Both sides number them alike, from the same externals.

    Raises:
        BpfsError: E2BIG, more than 64 of them.
    """
    found: list[Channel] = []
    ordered = sorted(externals, key=lambda external: int(external["key"]))
    ttys = tuple(external for external in ordered if external["kind"] == "tty")
    if ttys:
        modes = {int(external["access"]) for external in ttys}
        found.append(Channel(0, ChanKind.TTY, modes.pop() if len(modes) == 1 else os.O_RDWR, ttys))
    for external in ordered:
        if external["kind"] == "tty":
            continue
        kind = _KINDS.get(external["kind"], ChanKind.PIPE)
        access = os.O_RDWR if kind is ChanKind.SOCKET else int(external["access"])
        found.append(Channel(len(found), kind, access, (external,)))
    if len(found) > MAX_CHANS:
        raise BpfsError(E2BIG, f"{len(found)} descriptors to relay are more than {MAX_CHANS}")
    return found


def ghost_table(channels: Iterable[Channel]) -> bytes:
    """The channel table of a STREAM packet: each record with the ghost's own descriptor numbers."""
    parts = []
    for channel in channels:
        # A terminal's descriptor that can do most comes first: the ghost works with that one.
        fds = _best_first(channel)[:MAX_FDS]
        parts.append(_RECORD.pack(channel.number, channel.kind, channel.access, len(fds)))
        parts.append(struct.pack(f"<{len(fds)}i", *fds))
    return b"".join(parts)


def _best_first(channel: Channel) -> list[int]:
    best = max(channel.externals, key=lambda external: int(external["access"]) == os.O_RDWR)
    first = sorted(best["fds"])
    return first + [fd for fd in channel.fds if fd not in first]


def relay_table(channels: Iterable[tuple[Channel, Sequence[int]]]) -> bytes:
    """The channel table of an ATTACH packet: records that tell how many of the passed descriptors belong to each."""
    return b"".join(_RECORD.pack(chan.number, chan.kind, chan.access, len(fds)) for chan, fds in channels)


def tune_stream(connection: socket.socket) -> None:
    """Gives a stream a receive buffer of many segments.

    The kernel grows it by itself only where data is read by recv(2), not by splice(2); with the 64 kB segments of the
    loopback device and the default buffer of 128 kB, the sender then waits 200 ms at a time for a wider window.
    """
    for option in (getattr(socket, "SO_RCVBUFFORCE", 33), socket.SO_RCVBUF):  # 33: <asm-generic/socket.h>
        try:
            connection.setsockopt(socket.SOL_SOCKET, option, STREAM_BUFFER)
            return
        except PermissionError:
            continue
