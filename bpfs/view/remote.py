"""The daemon's ends of the streams to the master's server of files."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from errno import EBADMSG, EDQUOT, EIO, ENOSPC, ETIMEDOUT
from typing import Any

from bpfs.view import protocol
from bpfs.view.beside import Directory
from bpfs.view.peers import Giver, take
from bpfs.view.protocol import Attributes, Entry
from bpfs.view.store import CHUNK, Store


class Silent(OSError):
    """The master does not answer, or cannot be reached."""

    def __init__(self) -> None:
        super().__init__(EIO, "the master does not answer")


class Refused(OSError):
    """The master answered with an errno of the file's."""


class Connector:
    """Asks bpslave for streams: only it can have tokens from the master.

    Args:
        control: a SEQPACKET socket to bpslave. Each packet asks for one stream; the answer brings it.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lock = threading.Lock()
        self._owed = 0  # answers that come too late

    def connect(self, deadline: float) -> socket.socket:
        """A new stream. Raises Silent."""
        with self._lock:
            try:
                self._control.send(b"connect")
                self._owed += 1
                while self._owed:
                    self._control.settimeout(max(0.01, deadline - time.monotonic()))
                    text, fds, _, _ = socket.recv_fds(self._control, 256, 1)
                    self._owed -= 1
                    if not text:
                        raise Silent
                    if fds:
                        if self._owed:
                            socket.close(fds[0])
                        else:
                            return socket.socket(fileno=fds[0])
            except OSError:
                pass
            raise Silent


class Remote:
    """One stream, made when it is needed and again after it broke. For one thread.

    Args:
        timeout: seconds that a request may take.
        giver: gives to other nodes what is fetched.
    """

    def __init__(self, connector: Connector, timeout: float, giver: Giver) -> None:
        self._connector = connector
        self._giver = giver
        self._timeout = timeout
        self._sock: socket.socket | None = None

    def look(self, path: str) -> tuple[Entry, bool]:
        """What a path leads to, and whether changes are told. Raises Refused or Silent."""
        *known, watched = self._ask(["look", path])
        return _entry(*known), bool(watched)

    def beside(self, path: str) -> tuple[Directory, bool]:
        """All that is in a directory, None where that is too much, and whether changes are told.

        Raises:
            Refused, Silent: as `look`.
        """
        found, watched = self._ask(["beside", path])
        if found is None:
            return None, bool(watched)
        return {str(name): _entry(*known) if known else None for name, *known in found}, bool(watched)

    def names(self, path: str) -> tuple[list[tuple[str, int]], bool]:
        """A directory's names and types, and whether changes are told. Raises Refused or Silent."""
        entries, watched = self._ask(["list", path])
        return [(str(name), int(kind)) for name, kind in entries], bool(watched)

    def fetch(self, path: str, digest: str, store: Store, executes: bool = False) -> tuple[Attributes, str, int]:
        """Have a file's object in the store.

        Args:
            digest: what it is believed to be, and is not in the store; empty where that is not known.
            executes: it is wanted as a program.

        Returns:
            Its attributes, its digest, and the object's descriptor.

        Raises:
            Refused: as the master says; ETXTBSY: a program that somebody writes to.
            Silent: no answer, or what came was damaged three times.
            OSError: the store cannot take it (ENOSPC).
        """
        whole, others = bool(digest), True
        for _ in range(4):
            attributes, digest, body, peers = self._ask(["read", path, whole, others, executes])
            if peers:
                fd = self._from_others(peers, digest, attributes[4], store)
                if fd >= 0:
                    return Attributes(*attributes), digest, fd
                whole, others = True, False
                continue
            if body or not attributes[4]:
                try:
                    fd = store.put(digest, body, self._body(body))
                    self._tell(digest, body)
                    return Attributes(*attributes), digest, fd
                except Silent:
                    continue
                except OSError as error:
                    self.close()
                    if error.errno != EBADMSG:
                        raise
                    continue  # it changed while it was sent, or was damaged on the way
            try:
                return Attributes(*attributes), digest, store.open(digest)
            except OSError:
                whole = True
        raise Silent

    def _from_others(self, peers: list[list[Any]], digest: str, size: int, store: Store) -> int:
        """An object's descriptor, fetched from another node; -1 where none of them gives it."""
        for host, port, secret in peers:
            try:
                fd = store.put(digest, size, take((host, port, secret), digest, size))
            except OSError as error:
                if error.errno in (ENOSPC, EDQUOT):
                    raise
                continue  # it is gone, has dropped it, or sent something else
            store.statistics.peer_bytes += size
            self._tell(digest, size)
            return fd
        return -1

    def _tell(self, digest: str, size: int) -> None:
        """Others may have it from here."""
        if size > protocol.SMALL:
            with suppress(OSError):
                self._ask(["has", "/", digest])

    def _body(self, size: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(size, CHUNK)))
        while size:
            assert self._sock is not None
            try:
                got = self._sock.recv_into(buffer[: min(size, len(buffer))], 0, socket.MSG_WAITALL)
            except OSError:
                got = 0
            if not got:
                self.close()
                raise Silent
            yield buffer[:got]
            size -= got

    def events(self) -> Iterator[tuple[str, str, int]]:
        """Changes, for as long as the stream lasts; the first, empty one says that they are told from now on."""
        self.close()
        self._ask(["events", "/"])
        assert self._sock is not None
        self._sock.settimeout(None)
        yield "", "", -1
        while True:
            directory, name, kind = protocol.receive(self._sock)
            yield str(directory), str(name), int(kind)

    def _ask(self, request: list[Any]) -> list[Any]:
        deadline = time.monotonic() + self._timeout
        for fresh in (self._sock is None, True):
            try:
                if self._sock is None:
                    self._sock = self._connect(deadline)
                self._sock.settimeout(max(0.01, deadline - time.monotonic()))
                protocol.send(self._sock, request)
                answer = protocol.receive(self._sock)
                self._sock.settimeout(self._timeout)
            except OSError as error:
                self.close()
                # A stream that broke since it was used last says nothing yet.
                if fresh or isinstance(error, TimeoutError) or error.errno == ETIMEDOUT:
                    raise Silent from None
                continue
            if answer[0]:
                raise Refused(answer[0], "refused by the master")
            return answer[1:]
        raise Silent

    def _connect(self, deadline: float) -> socket.socket:
        sock = self._connector.connect(deadline)
        try:
            self._giver.open(sock)
            sock.settimeout(max(0.01, deadline - time.monotonic()))
            protocol.send(sock, ["here", "/", self._giver.port, self._giver.secret])
            protocol.receive(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        """Give the stream up."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _entry(attributes: list[int], target: str, digest: str, capability: bytes) -> Entry:
    return Entry(Attributes(*attributes), target, digest, capability)
