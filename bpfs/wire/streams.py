"""Byte streams beside the links: expected by a one-time token, then handed over as plain sockets.

The master gives a token to a slave over its link; the slave connects to the master's port and sends
`StreamOpen(token)` as its first frame. Tokens are random, used once, and forgotten with the one who expects them.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ECONNREFUSED, EINPROGRESS, ETIMEDOUT
from typing import Any

import trio

from bpfs.errors import BpfsError
from bpfs.wire import codec
from bpfs.wire.codec import Kind
from bpfs.wire.messages import StreamOpen

TOKEN = 32
"""Bytes of a token: 256 random bits cannot be guessed, so looking one up needs no constant time."""


class ExpectedStream:
    """A stream that has been announced to a slave."""

    def __init__(self, token: bytes) -> None:
        self.token = token
        self._arrived = trio.Event()
        self._sock: socket.socket | None = None

    def _arrive(self, sock: socket.socket) -> None:
        self._sock = sock
        self._arrived.set()

    async def wait_connected(self, timeout: float) -> socket.socket:
        """The connected socket (blocking mode off); the caller owns it.

        Raises:
            BpfsError: ETIMEDOUT.
        """
        with trio.move_on_after(timeout):
            await self._arrived.wait()
        if self._sock is None:
            raise BpfsError(ETIMEDOUT, f"the node's stream did not come within {timeout:g} s")
        sock, self._sock = self._sock, None
        return sock

    def _drop(self) -> None:
        if self._sock is not None:
            self._sock.close()


class StreamBook:
    """The streams that are expected now, and the numbers of all.

    Attributes:
        last: the highest number that was given to a stream to a ghost.
        on_number: called with each of these numbers.
    """

    def __init__(self) -> None:
        self._expected: dict[bytes, ExpectedStream] = {}
        self.last = 0
        self.on_number: Callable[[int], object] | None = None

    def new_number(self) -> int:
        """A number for a stream to a ghost, which no other stream of this cluster has ever had."""
        self.last += 1
        if self.on_number is not None:
            self.on_number(self.last)
        return self.last

    @contextmanager
    def expect(self) -> Iterator[ExpectedStream]:
        """Expect one stream for as long as the context lasts."""
        stream = ExpectedStream(os.urandom(TOKEN))
        self._expected[stream.token] = stream
        try:
            yield stream
        finally:
            self._expected.pop(stream.token, None)
            stream._drop()

    def arrive(self, token: bytes, sock: socket.socket) -> bool:
        """Hand a stream to whoever expects it; False (and the socket is the caller's still) where nobody does."""
        stream = self._expected.pop(token, None)
        if stream is None:
            return False
        stream._arrive(sock)
        return True


def _refuse_itself(sock: socket.socket) -> None:
    """Where nobody listens on a port of this very machine, the kernel may give a connection that port as its own, and
    join it to itself (RFC 9293, simultaneous open). Closed as usual it would keep the listener away for a minute."""
    if sock.getsockname() == sock.getpeername():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise ConnectionRefusedError(ECONNREFUSED, os.strerror(ECONNREFUSED))


async def connect(host: str, port: int) -> socket.socket:
    """A TCP connection as a plain non-blocking socket.

    Raises:
        OSError: as connect(2) says for the last address tried, or as getaddrinfo(3) says.
    """
    failure: OSError | None = None
    for family, kind, protocol, _, address in await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            await _connect(sock, address)
            _refuse_itself(sock)
            return sock
        except OSError as error:
            failure = error
            sock.close()
        except BaseException:
            sock.close()
            raise
    assert failure is not None  # getaddrinfo gives at least one address, or raises
    raise failure


async def _connect(sock: socket.socket, address: Any) -> None:
    # A node does this for every job, and trio's wrappers of these calls cost more than the calls.
    error = sock.connect_ex(address)
    if error == EINPROGRESS:
        await trio.lowlevel.wait_writable(sock)
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


async def open_stream(host: str, port: int, token: bytes) -> socket.socket:
    """The slave's side: connect and show the token; raw bytes may follow at once.

    Raises:
        OSError: as connect(2) and send(2) say.
    """
    sock = await connect(host, port)
    try:
        # The first bytes of a new connection always fit the socket's buffer.
        sock.sendall(codec.encode(Kind.NOTICE, 0, StreamOpen(token)))
    except BaseException:
        sock.close()
        raise
    return sock
