"""What bpslave asks of the view's daemon: how the cache is, to empty it, to fill it."""

from __future__ import annotations

import os
import re
import socket
import stat
import threading
from collections.abc import Callable
from errno import EINVAL, EISDIR, ELOOP

import msgpack

from bpfs.view.remote import Remote
from bpfs.view.store import Store

LINKS = 40  # as the kernel follows (MAXSYMLINKS)
_LIBRARY = re.compile(r"\.so($|\.)")


class Control:
    """Serves one socket: a packet `[number, verb, argument]` is answered by `[number, errno, text]`, in any order.

    Args:
        sock: SEQPACKET, to bpslave.
        remote: a stream of its own.
    """

    def __init__(self, sock: socket.socket, store: Store, remote: Remote) -> None:
        self._sock = sock
        self._store = store
        self._remote = remote
        self._turn = threading.Lock()
        self._verbs: dict[str, Callable[[str], str]] = {
            "status": self._status,
            "purge": self._purge,
            "prestage": self._prestage,
            "libraries": self._libraries,
        }

    def run(self) -> None:
        """Serve until bpslave closes its end, which ends the process, too."""
        while data := self._sock.recv(8192):
            number, verb, argument = msgpack.unpackb(data, unicode_errors="surrogateescape")
            # Fetching may take minutes, and nobody else is to wait for it.
            threading.Thread(target=self._answer, args=(number, verb, argument), daemon=True).start()
        os._exit(0)

    def _answer(self, number: int, verb: str, argument: str) -> None:
        try:
            answer = [number, 0, self._verbs[verb](argument)]
        except OSError as error:
            answer = [number, error.errno or EINVAL, error.strerror or str(error)]
        self._sock.send(msgpack.packb(answer, unicode_errors="surrogateescape"))

    def _status(self, _argument: str) -> str:
        store, it = self._store, self._store.statistics
        rows = {
            "objects": store.objects, "bytes": store.size, "limit": store.limit, "hits": it.hits,
            "misses": it.misses, "fetched_bytes": it.fetched_bytes, "peer_bytes": it.peer_bytes,
            "given_bytes": it.given_bytes, "evicted": it.evicted, "damaged": it.damaged,
        }  # fmt: skip
        return "".join(f"{key} {value}\n" for key, value in rows.items())

    def _purge(self, _argument: str) -> str:
        self._store.purge()
        return ""

    def _prestage(self, path: str) -> str:
        with self._turn:  # there is one stream
            self._fetch(path, LINKS)
        return ""

    def _libraries(self, path: str) -> str:
        with self._turn:
            plain = os.path.dirname(self._plain(os.path.normpath(path) + "/."))
            if not stat.S_ISDIR(self._remote.look(plain)[0].attributes.mode):
                self._fetch(plain, LINKS)
                return ""
            for name, type_ in self._remote.names(plain)[0]:
                if type_ << 12 == stat.S_IFREG and _LIBRARY.search(name):
                    self._fetch(os.path.join(plain, name), LINKS)
        return ""

    def _fetch(self, path: str, links: int) -> None:
        """Fetch a file, all files of a directory, or what a link leads to."""
        path = os.path.normpath(path)
        (attributes, target, digest, _), _ = self._remote.look(self._plain(path))
        kind = stat.S_IFMT(attributes.mode)
        if kind == stat.S_IFLNK:
            if not links:
                raise OSError(ELOOP, "too many symbolic links")
            self._fetch(os.path.join(os.path.dirname(self._plain(path)), target), links - 1)
        elif kind == stat.S_IFDIR:
            for name, type_ in self._remote.names(self._plain(path))[0]:
                if type_ << 12 in (stat.S_IFDIR, stat.S_IFREG):
                    self._fetch(os.path.join(path, name), links)
        elif kind == stat.S_IFREG:
            self._fetch_file(self._plain(path), digest)
        else:
            raise OSError(EISDIR, "is no regular file")

    def _fetch_file(self, path: str, digest: str) -> None:
        if digest:
            try:
                os.close(self._store.open(digest))
                return
            except OSError:
                pass  # not here yet
        os.close(self._remote.fetch(path, digest, self._store)[2])

    def _plain(self, path: str) -> str:
        """The path without symbolic links in its directories."""
        done = "/"
        words = [word for word in path.split("/") if word]
        for _ in range(LINKS * 8):
            if len(words) <= 1:
                return os.path.join(done, *words)
            first = os.path.join(done, words.pop(0))
            target = self._remote.look(first)[0].target
            if target:
                words = [w for w in os.path.normpath(os.path.join(done, target)).split("/") if w] + words
                done = "/"
            else:
                done = first
        raise OSError(ELOOP, "too many symbolic links")
