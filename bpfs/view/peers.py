"""Objects from node to node: a node gives what it has to others, and the master's server knows who has what.

Who asks for an object gets from the master's server the address of nodes that have it, each with the secret of that
node's life, which opens its door. What comes is checked against its digest, as from the master.
"""

from __future__ import annotations

import hmac
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from bpfs.view.protocol import receive_exactly
from bpfs.view.store import CHUNK, DIGEST, Store, is_digest

SECRET = 32  # bytes
ANSWER_TIMEOUT = 1.0
"""Seconds for another node to take a connection, and again to say that it has the object: the master has it, too."""
IDLE = 3.0
"""Seconds of silence after which either side gives up."""
GIVEN_AT_ONCE = 8
"""Objects that a node gives at once; who asks for more of them goes to the master."""
_SIZE = struct.Struct("<q")
_NONE = -1


class Giver:
    """The door of a node: gives objects of its store.

    Attributes:
        port: where, once there is a stream to the master; 0 before.
        secret: who knows it may have any object.
    """

    def __init__(self, store: Store) -> None:
        self.port = 0
        self.secret = os.urandom(SECRET)
        self._store = store
        self._lock = threading.Lock()
        self._places = threading.Semaphore(GIVEN_AT_ONCE)

    def open(self, stream: socket.socket) -> None:
        """Listen on the address by which the master sees this node. Raises OSError."""
        with self._lock:
            if self.port:
                return
            listener = socket.create_server((stream.getsockname()[0], 0), family=stream.family, backlog=64)
            self.port = listener.getsockname()[1]
        threading.Thread(target=self._run, args=(listener,), name="giver", daemon=True).start()

    def _run(self, listener: socket.socket) -> None:
        while True:
            sock, _ = listener.accept()
            if self._places.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()
            else:
                sock.close()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock:
                sock.settimeout(IDLE)
                request = bytes(receive_exactly(sock, SECRET + DIGEST))
                digest = request[SECRET:].decode("ascii", "replace")
                if hmac.compare_digest(request[:SECRET], self.secret) and is_digest(digest):
                    self._give(sock, digest)
        except OSError:
            pass  # it went away
        finally:
            self._places.release()

    def _give(self, sock: socket.socket, digest: str) -> None:
        try:
            fd = self._store.open(digest)
        except OSError:
            sock.sendall(_SIZE.pack(_NONE))
            return
        with open(fd, "rb") as file:
            sock.sendall(_SIZE.pack(os.fstat(fd).st_size))
            self._store.statistics.given_bytes += sock.sendfile(file)


def take(peer: tuple[str, int, bytes], digest: str, size: int) -> Iterator[memoryview]:
    """An object's bytes from another node.

    Raises:
        OSError: it does not answer, or has not this object of this size (ENOENT).
    """
    host, port, secret = peer
    with socket.create_connection((host, port), ANSWER_TIMEOUT) as sock:
        sock.sendall(secret + digest.encode())
        if _SIZE.unpack(receive_exactly(sock, _SIZE.size)) != (size,):
            raise FileNotFoundError
        sock.settimeout(IDLE)
        buffer = memoryview(bytearray(min(size, CHUNK)))
        while size:
            got = sock.recv_into(buffer[: min(size, len(buffer))])
            if not got:
                raise ConnectionResetError
            yield buffer[:got]
            size -= got


# ---- the master's side -----------------------------------------------------------------------------------

TOLD = 3
"""Nodes that are named to who asks."""
ABREAST = 4
"""Streams on which the master sends one and the same object at once; who comes then waits for others to have it."""
PATIENCE = 2.0
"""Seconds of that wait at most, of the ten that a request may take."""


@dataclass(slots=True)
class _Holder:
    host: str
    port: int
    streams: set[socket.socket] = field(default_factory=set)
    digests: set[str] = field(default_factory=set)


class Holders:
    """Which nodes have which objects, as they say themselves. Safe for threads."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._holders: dict[bytes, _Holder] = {}  # by secret
        self._of: dict[socket.socket, bytes] = {}
        self._sending: Counter[str] = Counter()

    def announce(self, stream: socket.socket, port: int, secret: bytes) -> None:
        """A stream is of the node with this door."""
        with self._turn:
            self._of[stream] = secret
            self._holders.setdefault(secret, _Holder(stream.getpeername()[0], port)).streams.add(stream)

    def has(self, stream: socket.socket, digest: str) -> None:
        """The node of a stream has an object now."""
        with self._turn:
            if stream in self._of and is_digest(digest):
                self._holders[self._of[stream]].digests.add(digest)
                self._turn.notify_all()

    def gone(self, stream: socket.socket) -> None:
        """A stream has ended; with the last of its node that is forgotten."""
        with self._turn:
            holder = self._holders.get(self._of.get(stream, b""))
            if holder is not None:
                holder.streams.discard(stream)
                if not holder.streams:
                    del self._holders[self._of[stream]]
                del self._of[stream]

    def others(self, stream: socket.socket, digest: str) -> list[tuple[str, int, bytes]]:
        """Some other nodes that have an object. Empty: it is to be sent, and `sent` called afterwards."""
        deadline = time.monotonic() + PATIENCE
        with self._turn:
            while True:
                mine = self._of.get(stream)
                found = [
                    (one.host, one.port, secret)
                    for secret, one in self._holders.items()
                    if secret != mine and digest in one.digests
                ]
                if found:
                    return random.sample(found, min(TOLD, len(found)))
                if self._sending[digest] < ABREAST or not self._turn.wait(max(0.0, deadline - time.monotonic())):
                    self._sending[digest] += 1
                    return []

    def sent(self, digest: str) -> None:
        """An object has been sent, or could not be."""
        with self._turn, suppress(KeyError):
            self._sending[digest] -= 1
            if self._sending[digest] <= 0:
                del self._sending[digest]
            self._turn.notify_all()
