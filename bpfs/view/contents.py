"""Opening and reading files: objects of the store, passed through where the kernel can."""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import suppress
from errno import EIO, ESTALE

from bpfs.view import fuse
from bpfs.view.changes import Changes
from bpfs.view.core import Core, Quick, Request, Slow
from bpfs.view.fuse import Op
from bpfs.view.nodes import Node
from bpfs.view.remote import Remote
from bpfs.view.store import Store

IDLE = 1000
"""Objects that are kept open after their last user has closed them: opening one again costs half then."""


class Contents:
    """The handlers of this kind; see `Quick` and `Slow`."""

    def __init__(self, core: Core, changes: Changes, store: Store) -> None:
        self._core = core
        self._changes = changes
        self._store = store
        self._idle: OrderedDict[int, Node] = OrderedDict()
        self.quick: dict[int, Quick] = {Op.OPEN: self._open, Op.READ: self._read, Op.RELEASE: self._release}
        self.slow: dict[int, Slow] = {Op.OPEN: self._open_far, Op.READ: self._read_far}
        core.nodes.dropped = self._let_go
        store.before_removal = self.drop_idle

    def drop_idle(self, keep: int = 0) -> None:
        """Close what nobody uses, the oldest first."""
        with self._core.lock:
            while len(self._idle) > keep:
                self._let_go(self._idle.popitem(last=False)[1])

    def _let_go(self, node: Node) -> None:
        self._idle.pop(node.number, None)
        if node.backing:
            with suppress(OSError):
                self._core.device.close_backing(node.backing)  # what is mapped stays so
            if node.number in self._core.nodes.by_number:
                self._core.nodes.has_backing(node, 0)
        if node.fd >= 0:
            os.close(node.fd)
            node.fd = -1

    # -- open --------------------------------------------------------------------------------------

    def _open(self, request: Request) -> bool:
        node = self._core.node(request)
        if not node.opens and node.fd >= 0 and not self._store.is_sound(node.digest, node.fd):
            self._let_go(node)
        if node.backing or node.fd >= 0:
            self._store.statistics.hits += 1
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
            flags, *_ = fuse.OPEN_IN.unpack_from(request.body)
            executes = bool(flags & fuse.FMODE_EXEC)
            attributes, digest, fd = remote.fetch(node.path, node.digest, self._store, executes)
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
        if fd >= 0:
            self._attach(node, fd)
        if self._core.wanted(request):
            node.opens += 1
            self._idle.pop(node.number, None)
            flags = fuse.FOPEN_NOFLUSH | (fuse.FOPEN_PASSTHROUGH if node.backing else fuse.FOPEN_KEEP_CACHE)
            self._core.reply(request, fuse.open_out(node.number, flags, node.backing))
        return True

    def _attach(self, node: Node, fd: int) -> None:
        if node.backing or node.fd >= 0:  # two opens came for it at once
            os.close(fd)
            return
        self._idle[node.number], node.fd = node, fd
        if self._core.nodes.passthrough:
            # Where the cache's file system cannot (overlayfs), pages are read through us.
            with suppress(OSError):
                self._core.nodes.has_backing(node, self._core.device.open_backing(fd))

    # -- read and close ----------------------------------------------------------------------------

    def _read(self, request: Request) -> bool:
        node = self._core.node(request)
        if node.fd < 0:  # the daemon before us had it open
            node.fd = self._stored(node)
        _, offset, size, *_ = fuse.READ_IN.unpack_from(request.body)
        return node.fd >= 0 and self._core.reply(request, os.pread(node.fd, size, offset))

    def _read_far(self, request: Request, remote: Remote) -> None:
        """The object has been lost since it was opened."""
        node = self._core.node(request)
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
        node.opens -= 1
        if node.opens == 0:  # below: an earlier daemon has opened it, and it may have more open
            self._idle[node.number] = node
            self.drop_idle(IDLE)
        node.opens = max(node.opens, 0)
        return self._core.reply(request)
