"""Opening and reading files: objects of the store, passed through where the kernel can."""

from __future__ import annotations

import os
from contextlib import suppress
from errno import EIO, ENOTDIR, ESTALE

from bpfs.view import fuse
from bpfs.view.changes import Changes
from bpfs.view.core import Core, Quick, Request, Slow
from bpfs.view.fuse import Op
from bpfs.view.nodes import Node
from bpfs.view.remote import Remote
from bpfs.view.store import Store


class Contents:
    """The handlers of this kind; see `Quick` and `Slow`."""

    def __init__(self, core: Core, changes: Changes, store: Store) -> None:
        self._core = core
        self._changes = changes
        self._store = store
        self.quick: dict[int, Quick] = {Op.OPEN: self._open, Op.READ: self._read, Op.RELEASE: self._release}
        self.slow: dict[int, Slow] = {Op.OPEN: self._open_far, Op.READ: self._read_far}

    def take_over(self) -> None:
        """Open again what the daemon before us had open and did not pass through."""
        for node in self._core.nodes.by_number.values():
            if node.opens and not node.backing and node.digest:
                with suppress(OSError):
                    node.fd = self._store.open(node.digest)

    # -- open --------------------------------------------------------------------------------------

    def _open(self, request: Request) -> bool:
        node = self._core.node(request)
        if node.opens and (node.backing or node.fd >= 0):
            return self._give(request, node, -1)
        fd = self._stored(node)
        if fd < 0:
            return False
        self._store.statistics.hits += 1
        return self._give(request, node, fd)

    def _stored(self, node: Node) -> int:
        if not node.digest:
            return -1
        try:
            return self._store.open(node.digest)
        except OSError:
            return -1

    def _open_far(self, request: Request, remote: Remote) -> None:
        with self._core.lock:
            node = self._core.node(request)
        fd = self._stored(node)  # another request may have fetched it meanwhile
        if fd < 0:
            self._store.statistics.misses += 1
            attributes, digest, fd = remote.fetch(node.path, node.digest, self._store)
            with self._core.lock:
                if self._changes.replace(node, attributes):
                    os.close(fd)
                    self._core.refuse(request, ESTALE)  # the kernel looks it up anew, once
                    return
                self._core.nodes.has_digest(node, digest)
        with self._core.lock:
            self._give(request, node, fd)

    def _give(self, request: Request, node: Node, fd: int) -> bool:
        """Answer an open; `fd`: the object, -1 where it is open already."""
        if fd >= 0 and (node.opens or not self._core.wanted(request)):
            os.close(fd)
        elif fd >= 0:
            self._attach(node, fd)
        if self._core.wanted(request):
            self._core.nodes.opened(node, node.backing, node.fd >= 0)
            flags = fuse.FOPEN_NOFLUSH | (fuse.FOPEN_PASSTHROUGH if node.backing else fuse.FOPEN_KEEP_CACHE)
            self._core.reply(request, fuse.open_out(node.number, flags, node.backing))
        return True

    def _attach(self, node: Node, fd: int) -> None:
        if self._core.nodes.passthrough:
            try:
                node.backing = self._core.device.open_backing(fd)
            except OSError:
                pass  # the cache's file system cannot (overlayfs): pages are read through us
            else:
                os.close(fd)
                return
        node.fd = fd

    # -- read and close ----------------------------------------------------------------------------

    def _read(self, request: Request) -> bool:
        node = self._core.node(request)
        _, offset, size, *_ = fuse.READ_IN.unpack_from(request.body)
        return node.fd >= 0 and self._core.reply(request, os.pread(node.fd, size, offset))

    def _read_far(self, request: Request, remote: Remote) -> None:
        """The daemon before us had it open, and the object has been lost since."""
        node = self._core.node(request)
        if not node.opens:
            raise OSError(ENOTDIR, "is not open")
        _, digest, fd = remote.fetch(node.path, "", self._store)
        with self._core.lock:
            if digest == node.digest and node.fd < 0:
                node.fd = fd
                self._read(request)
                return
            os.close(fd)
            self._core.refuse(request, EIO)

    def _release(self, request: Request) -> bool:
        node = self._core.node(request)
        backing, fd, last = node.backing, node.fd, node.opens <= 1
        if last:
            node.fd = -1
        self._core.nodes.released(node)
        if last and backing:
            with suppress(OSError):
                self._core.device.close_backing(backing)  # what is mapped stays so
        if last and fd >= 0:
            os.close(fd)
        return self._core.reply(request)
