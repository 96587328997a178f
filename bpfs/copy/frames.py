# SPDX-License-Identifier: GPL-2.0-or-later
"""The stream of a copy: frames of a kind, a length and an offset, from the sender down a tree of receivers.

A receiver passes every frame on as it is before it looks at it, so that a full disk in the middle of the tree is
nobody else's trouble.
"""

from __future__ import annotations

import enum
import hmac
import json
import socket
import struct
from collections.abc import Callable, Iterator
from errno import EPROTO
from typing import Any

HEAD = struct.Struct("!BIQ")

CHUNK = 1 << 20
"""Bytes of a frame at most: read, hashed, sent and written at once."""

CONNECT_S = 15.0
"""Seconds for a receiver to accept its connection."""

STANDS_STILL = "it took nothing for too long"

_PATIENCE = 20  # times the time that a child has to take a frame in, for the next one to come


class Kind(enum.IntEnum):
    """What a frame holds."""

    SOURCE = 1  # JSON: a source begins: name, whether it is a directory
    FOLDER = 2  # JSON: meta data of a directory
    LINK = 3  # JSON: of a symbolic link
    FILE = 4  # JSON: of a regular file; its data follow
    DATA = 5  # bytes of the file from `offset` on; what no frame covers is a hole
    FILE_END = 6  # SHA-256 of the data frames, heads and all; the offset is the file's size
    FILE_BAD = 7  # the sender could not read it to its end
    END = 8  # of the copy


class FeedLost(Exception):
    """The stream ended too early: whoever sends is gone, or sends nonsense."""


class Children:
    """The receivers that this one feeds; one that fails or stands still is dropped, and reported."""

    def __init__(self, stall: float, report: Callable[..., None]) -> None:
        """Args:
        stall: seconds in which a child has to take a frame.
        report: is called with `dropped` and `why` for a child that is given up.
        """
        self._stall = stall
        self._report = report
        self._sockets: dict[int, socket.socket] = {}

    def connect(self, node: int, host: str, port: int, token: bytes) -> None:
        """Connects to a child and shows it the token that it was given for this."""
        try:
            child = socket.create_connection((host, port), timeout=CONNECT_S)
            child.settimeout(self._stall)
            child.sendall(token)
        except OSError as error:
            self._report(dropped=node, why=_why(error))
        else:
            self._sockets[node] = child

    def __bool__(self) -> bool:
        return bool(self._sockets)

    def send(self, head: bytes | bytearray, body: bytes | memoryview) -> None:
        """Gives a frame to every child, at the pace of the slowest."""
        for node, child in list(self._sockets.items()):
            try:
                child.sendall(head)
                child.sendall(body)
            except OSError as error:
                self._report(dropped=node, why=_why(error))
                self._sockets.pop(node).close()

    def close(self) -> None:
        """Ends all connections."""
        for child in self._sockets.values():
            child.close()


def _why(error: OSError) -> str:
    return STANDS_STILL if isinstance(error, TimeoutError) else error.strerror or str(error)


def pack_json(kind: Kind, **fields: Any) -> tuple[bytes, bytes]:
    """Returns head and body of a frame with JSON in it; strange bytes in names go as surrogates."""
    body = json.dumps(fields).encode()
    return HEAD.pack(kind, len(body), 0), body


def accept(listener: socket.socket, token: bytes, timeout: float) -> socket.socket:
    """Waits for the connection that shows our token.

    Raises:
        FeedLost: none came in time.
    """
    listener.settimeout(timeout)
    try:
        while True:
            feed, _ = listener.accept()
            feed.settimeout(CONNECT_S)
            try:
                if hmac.compare_digest(_read(feed, bytearray(len(token))), token):
                    return feed
            except FeedLost:
                pass  # somebody else knocked
            feed.close()
    except OSError:
        raise FeedLost("nobody connected") from None


def frames(feed: socket.socket, children: Children, stall: float) -> Iterator[tuple[Kind, int, memoryview]]:
    """Yields kind, offset and body of every frame up to END, passing each on; the body is good until the next one.

    Raises:
        FeedLost: before END.
    """
    # A place above that is gone is bpcp's to notice; one that waits for a slow disk is not gone.
    feed.settimeout(_PATIENCE * stall)
    head, buffer = bytearray(HEAD.size), bytearray(CHUNK)
    kind = Kind.SOURCE
    while kind is not Kind.END:
        number, length, offset = HEAD.unpack(_read(feed, head))
        if length > CHUNK or number not in Kind.__members__.values():
            raise FeedLost(f"a frame of kind {number} with {length} bytes (errno {EPROTO})")
        kind = Kind(number)
        body = _read(feed, buffer, length)
        children.send(head, body)
        yield kind, offset, body


def _read(feed: socket.socket, buffer: bytearray, length: int | None = None) -> memoryview:
    view = memoryview(buffer)[:length]
    done = 0
    while done < len(view):
        try:
            got = feed.recv_into(view[done:])
        except OSError as error:
            raise FeedLost(_why(error)) from None
        if not got:
            raise FeedLost("the connection ended")
        done += got
    return view
