"""What the view daemon and the master's server of files say to each other, on streams of their own.

A packet is a u32 (little-endian) length and that many bytes of msgpack, an array. A request is `[op, path, flag]`,
its answer `[errno, …]`; one request at a time a stream. After the answer to `read` with a body come its raw bytes.

    look  path        -> [0, attributes, link target or "", digest or "", file capabilities, watched]
    beside path       -> [0, [[name, attributes, link target or "", digest or "", file capabilities], …] or nil,
                         watched]: all that is in a directory; a name alone: to be asked for by `look`; nil: too much
    list  path        -> [0, [[name, type], …], watched]
    read  path, body, others, executes -> [0, attributes, digest, bytes of the body that follows, others]; body 0: only
                         if it is small; `others`: instead of a body there may be nodes that have it:
                         [[host, port, secret], …]; `executes`: not what somebody writes to (ETXTBSY)
    here  /, port, secret    -> [0]: the node of this stream gives objects there (bpfs.view.peers)
    has   /, digest   -> [0]: that node has this object now
    tops  /           -> [0, [[path, link target or ""], …]]
    events            -> [0], and from then on packets of changes: [directory, name, kind]

`watched`: changes are told; else the answer must not be kept. Attributes are those of `Attributes`, in order.
"""

from __future__ import annotations

import enum
import os
import socket
import struct
from errno import EPIPE
from typing import Any, NamedTuple

import msgpack

LENGTH = struct.Struct("<I")
LIMIT = 16 << 20
"""Bytes of the longest packet: the listing of a directory of 300,000 names."""

SMALL = 128 << 10
"""Bytes of a file that is sent along unasked: less than a round trip's worth on a fast network."""

TOKEN_TIMEOUT = 10.0
"""Seconds for a node to bring the stream that it asked for."""


class Change(enum.IntEnum):
    """What an event says."""

    ENTRY = 0  # the name leads to something else now, or to nothing, or to something new
    CONTENT = 1  # what the name leads to has changed
    ALL = 2  # forget all below this directory (events were lost)


class Attributes(NamedTuple):
    """Of one object."""

    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    ctime_ns: int
    ino: int


class Entry(NamedTuple):
    """What `look` says of an object."""

    attributes: Attributes
    target: str
    digest: str
    capability: bytes


def send(sock: socket.socket, packet: list[Any]) -> None:
    """Send one packet. Raises OSError."""
    body = msgpack.packb(packet, use_bin_type=True, unicode_errors="surrogateescape")
    sock.sendall(LENGTH.pack(len(body)) + body)


def receive(sock: socket.socket) -> list[Any]:
    """Receive one packet.

    Raises:
        OSError: the stream ended, was silent for its timeout, or sent no packet.
    """
    (length,) = LENGTH.unpack(receive_exactly(sock, LENGTH.size))
    if length > LIMIT:
        raise OSError(EPIPE, "sent a packet that is too long")
    try:
        packet = msgpack.unpackb(receive_exactly(sock, length), unicode_errors="surrogateescape")
    except ValueError as error:
        raise OSError(EPIPE, f"sent no msgpack: {error}") from None
    if not isinstance(packet, list) or not packet:
        raise OSError(EPIPE, "sent no packet")
    return packet


def receive_exactly(sock: socket.socket, size: int) -> bytearray:
    """So many bytes. Raises OSError."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise OSError(EPIPE, os.strerror(EPIPE))
        view = view[got:]
    return data
