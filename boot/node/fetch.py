"""HTTP as far as a booting node needs it: GET, resumed where it broke, checked before use."""

from __future__ import annotations

import hashlib
import ipaddress
import mmap
import os
import random
import socket
import time

from boot.errors import BootError
from boot.manifest import MOST, Blob
from boot.node.console import say

TIMEOUT = 10.0
"""Seconds of silence after which a connection is given up."""
PATIENCE = 8
"""Attempts in a row that bring nothing until a download is given up, and the node starts over."""
TRIES = 3
"""Times that a file is fetched whole and turns out to be damaged, until the node starts over."""
PEERS_MOST = 3
"""Peers that are tried before the server."""
TELL_EVERY = 2.0
"""Seconds between two words to the server of how far a peer's file is: of its own it knows."""
CHUNK = 1 << 20
HEAD_MOST = 16384


class Server:
    """The boot server of this node."""

    def __init__(self, address: str, port: int) -> None:
        self._address = (address, port)
        self._peers: list[tuple[str, int]] = []
        self._told = 0.0

    @property
    def source(self) -> str:
        """Whom the next file is asked of first."""
        return (self._peers[0] if self._peers else self._address)[0]

    def find_peers(self) -> None:
        """Ask for nodes that pass files on: they are tried first, in an order of chance."""
        try:
            words = self.text("/peers").decode(errors="replace").split()
            self._peers = [(str(ipaddress.IPv4Address(word)), self._address[1]) for word in words]
        except (BootError, OSError, ValueError):
            self._peers = []
        random.shuffle(self._peers)
        del self._peers[PEERS_MOST:]

    def text(self, path: str) -> bytes:
        """A small document. Raises BootError or OSError."""
        with self._get(path, 0) as sock:
            status, body = _head(sock, path)
            _expect(status, (200,), path)
            while len(body) <= MOST and (data := sock.recv(CHUNK)):
                body += data
        return body

    def blob(self, blob: Blob, what: str) -> int:
        """A file into memory; gives its descriptor.

        Raises:
            BootError: what arrived is not what the manifest promised, or it does not arrive.
        """
        for _ in range(TRIES):
            fd = os.memfd_create(what, os.MFD_CLOEXEC)
            try:
                self._all(fd, blob, what)
                with mmap.mmap(fd, blob.size, prot=mmap.PROT_READ) as content:
                    if hashlib.sha256(content).hexdigest() == blob.digest:
                        return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            self._peers.clear()
            say(f"the {what} was damaged on its way")
        raise BootError(f"the {what} was damaged on its way, {TRIES} times")

    def _all(self, fd: int, blob: Blob, what: str) -> None:
        """Go on where it broke, until all of it is there."""
        have, attempts = 0, 0
        while have < blob.size:
            before, reason = have, "the connection ended early"
            peer = self._peers[0] if self._peers else None
            try:
                self._more(fd, blob, have, peer, what)
            except (OSError, BootError) as error:
                if peer is None and isinstance(error, BootError):
                    raise
                reason = str(getattr(error, "strerror", None) or error)
            have = os.fstat(fd).st_size
            if peer is not None and have < blob.size:
                self._peers.pop(0)
                say(f"{peer[0]} does not pass the {what} on: {reason}")
                continue
            attempts = 0 if have > before else attempts + 1
            if have < blob.size:
                if attempts >= PATIENCE:
                    raise BootError(f"the {what} cannot be fetched: {reason}")
                time.sleep(min(0.25 * 2**attempts, 4.0) * random.uniform(0.5, 1.5))

    def _more(self, fd: int, blob: Blob, have: int, peer: tuple[str, int] | None, what: str) -> None:
        with self._get(f"/{blob.name}", have, peer or self._address) as sock:
            status, data = _head(sock, blob.name)
            _expect(status, (206,) if have else (200,), blob.name)
            while have < blob.size:
                if not data and not (data := sock.recv(CHUNK)):
                    break
                data = data[: blob.size - have]
                os.pwrite(fd, data, have)
                have += len(data)
                data = b""
                if peer is not None and time.monotonic() - self._told > TELL_EVERY:
                    self._told = time.monotonic()
                    self._tell(f"/progress/{what}/{100 * have // blob.size}")

    def _tell(self, path: str) -> None:
        try:
            self.text(path)
        except (BootError, OSError):
            pass  # it is for people to look at only

    def _get(self, path: str, start: int, source: tuple[str, int] | None = None) -> socket.socket:
        sock = socket.create_connection(source or self._address, TIMEOUT)
        ranges = f"Range: bytes={start}-\r\n" if start else ""
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {self._address[0]}\r\nConnection: close\r\n{ranges}\r\n".encode())
        return sock


def _head(sock: socket.socket, path: str) -> tuple[int, bytes]:
    """Status of an answer, and what came of its body with the head."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(CHUNK)
        if not more or len(data) > HEAD_MOST:
            raise BootError(f"the server's answer to {path} makes no sense")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    words = head.split(b"\r\n")[0].split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise BootError(f"the server's answer to {path} makes no sense")
    return int(words[1]), body


def _expect(status: int, good: tuple[int, ...], path: str) -> None:
    if status not in good:
        raise BootError(f"the server answers {status} to {path}")
