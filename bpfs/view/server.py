"""The master's server of names and contents: a process of its own, so that no digest ever delays bpmaster.

bpmaster (bpfs.master.view) starts it when the first node asks for files, and hands it connected streams (one-time
tokens, asked for over authenticated links) and the list of exports, again whenever that was read again.
A thread a stream answers requests; one thread tells all `events` streams what has changed.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
from errno import EINVAL, ETXTBSY
from typing import Any

import msgpack

from bpfs import kernel, log
from bpfs.view import protocol
from bpfs.view.exports import Exports
from bpfs.view.files import Digests, Files, Looked, is_written
from bpfs.view.peers import Holders
from bpfs.view.protocol import SMALL, Change, Entry
from bpfs.view.watches import Watches

_log = log.get("view")

IDLE_SEND = 20.0
"""Seconds that a node may refuse to take what it asked for."""

MAX_EVENTS = 256
"""Bytes (kB) of changes that may wait for a node; one that takes none is dropped, and forgets all when it is back."""


class Server:
    """The server itself."""

    def __init__(self) -> None:
        self._files = Files(Exports())
        self._digests = Digests()
        self._watches = Watches(self._files, self._tell)
        self._listeners: set[socket.socket] = set()
        self._telling = threading.Lock()
        self._holders = Holders()
        self._operations = {"look": self._look, "beside": self._beside, "list": self._list, "tops": self._tops}

    def run(self, control: socket.socket) -> None:
        """Serve until bpmaster closes its end."""
        threading.Thread(target=self._watches.run, name="changes", daemon=True).start()
        while True:
            message, fds, _, _ = socket.recv_fds(control, 1 << 16, 4)
            if not message:
                return
            if not fds:
                self._files.exports = Exports(*msgpack.unpackb(message))
                self._tell("/", "", Change.ALL)
            for fd in fds:
                stream = socket.socket(fileno=fd)
                threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream: socket.socket) -> None:
        stream.setblocking(True)
        listens = False
        try:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(IDLE_SEND * 1000))
            while not listens:
                request = protocol.receive(stream)
                listens = self._answer(stream, request)
        except OSError:
            pass  # it went away, or talks nonsense
        finally:
            self._holders.gone(stream)
            if not listens:
                stream.close()

    def _answer(self, stream: socket.socket, request: list[Any]) -> bool:
        """Answer one request; True where the stream is for events from now on."""
        op, path = str(request[0]), request[1] if len(request) > 1 else "/"
        if not isinstance(path, str):
            raise OSError(EINVAL, "sent no path")
        if op == "events":
            self._listen(stream)
            return True
        try:
            if op == "read":
                self._read(stream, path, *(bool(flag) for flag in [*request[2:5], False, False, False][:3]))
                return False
            if op in ("here", "has"):
                self._hear(stream, op, request[2:])
                protocol.send(stream, [0])
                return False
            operation = self._operations.get(op)
            if operation is None:
                raise OSError(EINVAL, "sent an unknown request")
            answer = [0, *operation(path)]
        except _Refused as refusal:
            answer = [refusal.errno]
        protocol.send(stream, answer)
        return False

    # -- requests ----------------------------------------------------------------------------------

    def _look(self, path: str) -> list[Any]:
        # Watched first: what changes after the look is told.
        watched = self._watches.add(path.rpartition("/")[0] or "/")
        with _refusing():
            looked = self._files.look(path)
        return [*self._entry(looked), watched]

    def _beside(self, path: str) -> list[Any]:
        watched = self._watches.add(path)
        with _refusing():
            found = self._files.beside(path)
        return [found and [[name, *(self._entry(looked) if looked else ())] for name, looked in found], watched]

    def _entry(self, looked: Looked) -> Entry:
        status, target, capability = looked
        return Entry(self._files.attributes(status), target, self._digests.known(status), capability)

    def _list(self, path: str) -> list[Any]:
        watched = self._watches.add(path)
        with _refusing():
            return [self._files.list(path), watched]

    def _tops(self, _path: str) -> list[Any]:
        with _refusing():
            return [[[path, self._files.look(path)[1]] for path in self._files.exports.tops()]]

    def _hear(self, stream: socket.socket, op: str, words: list[Any]) -> None:
        if op == "has" and len(words) == 1 and isinstance(words[0], str):
            self._holders.has(stream, words[0])
        elif op == "here" and len(words) == 2 and isinstance(words[0], int) and isinstance(words[1], bytes):
            self._holders.announce(stream, *words)
        else:
            raise OSError(EINVAL, "sent nonsense")

    def _read(self, stream: socket.socket, path: str, wanted: bool, others: bool, executes: bool) -> None:
        with _refusing():
            fd = self._files.open(path)
        try:
            with _refusing():
                if executes and is_written(fd):
                    raise OSError(ETXTBSY, os.strerror(ETXTBSY), path)
                digest, status = self._digests.of(fd)
            attributes = self._files.attributes(status)
            if status.st_size <= SMALL or not wanted:
                body = status.st_size if status.st_size <= SMALL else 0
                self._send(stream, fd, [0, attributes, digest, body, []])
                return
            found = self._holders.others(stream, digest) if others else []
            if found:
                protocol.send(stream, [0, attributes, digest, 0, found])
                return
            try:
                self._send(stream, fd, [0, attributes, digest, status.st_size, []])
            finally:
                if others:
                    self._holders.sent(digest)
        finally:
            os.close(fd)

    def _send(self, stream: socket.socket, fd: int, answer: list[Any]) -> None:
        protocol.send(stream, answer)
        at, body = 0, answer[3]
        while at < body:
            sent = os.sendfile(stream.fileno(), fd, at, body - at)
            if not sent:
                raise OSError(EINVAL, "it was cut short meanwhile")
            at += sent

    # -- events ------------------------------------------------------------------------------------

    def _listen(self, stream: socket.socket) -> None:
        protocol.send(stream, [0])
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_EVENTS << 10)
        stream.setblocking(False)
        self._listeners.add(stream)

    def _tell(self, directory: str, name: str, change: Change) -> None:
        with self._telling:
            for stream in list(self._listeners):
                try:
                    protocol.send(stream, [directory, name, int(change)])
                except OSError:
                    # Gone, or it takes nothing any more: it sees the end, and forgets all.
                    self._listeners.discard(stream)
                    stream.close()


class _Refused(Exception):
    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


class _refusing:
    """Tells what a request is refused with from what ends a stream."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError):
            raise _Refused(error.errno or EINVAL) from None


def main(argv: list[str]) -> int:
    """`CONTROL_FD`: started by bpmaster only. A packet with a descriptor is a stream, one without the exports."""
    for signo in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signo, signal.SIG_IGN)  # the master's end is the end of the socket
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # somebody opens what `is_written` looks at
    kernel.set_comm("bpfiles")
    kernel.set_parent_death_signal(signal.SIGKILL)
    log.start("bpfiles")
    gc.freeze()
    threading.stack_size(256 << 10)
    Server().run(socket.socket(fileno=int(argv[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
