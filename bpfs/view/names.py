"""Look-ups, attributes, links and directories."""

from __future__ import annotations

import os
from errno import ENODATA, ENOENT

from bpfs.view import fuse
from bpfs.view.changes import ABSENT_KEPT, Changes
from bpfs.view.core import Core, Quick, Request, Slow
from bpfs.view.fuse import Op
from bpfs.view.nodes import Node
from bpfs.view.protocol import Entry
from bpfs.view.remote import Refused, Remote
from engine import digests

DIGEST = digests.ATTRIBUTE.encode()
VALID = 1 << 30
"""Seconds that the kernel may keep what it was told: for ever, for changes are told."""


class Names:
    """The handlers of this kind; see `Quick` and `Slow`."""

    def __init__(self, core: Core, changes: Changes) -> None:
        self._core = core
        self._nodes = core.nodes
        self._changes = changes
        self.quick: dict[int, Quick] = {
            Op.LOOKUP: self._lookup,
            Op.FORGET: self._forget,
            Op.BATCH_FORGET: self._forget_many,
            Op.GETATTR: self._getattr,
            Op.READLINK: self._readlink,
            Op.OPENDIR: self._opendir,
            Op.READDIR: self._readdir,
            Op.RELEASEDIR: lambda request: core.reply(request),
            Op.GETXATTR: self._getxattr,
            Op.LISTXATTR: lambda request: core.reply(request, bytes(8)),
        }
        self.slow: dict[int, Slow] = {
            Op.LOOKUP: self._lookup_far,
            Op.GETATTR: self._getattr_far,
            Op.READLINK: self._readlink_far,
            Op.OPENDIR: self._opendir_far,
        }

    # -- look-ups ----------------------------------------------------------------------------------

    def _lookup(self, request: Request) -> bool:
        path = self._core.child(request)
        node = self._nodes.by_path.get(path)
        if node is not None and node.fresh:
            return self._give(request, node)
        if path in self._changes.absent:
            return self._core.reply(request, fuse.entry_out(0, 0, None, VALID))
        return self._lookup_beside(request, path)

    def _lookup_beside(self, request: Request, path: str) -> bool:
        directory, name = _split(path)
        entries = self._changes.beside.of(directory)
        if entries is None:
            return False
        if name not in entries:
            self._give_nothing(request, path, True)
            return True
        entry = entries[name]
        return entry is not None and self._enter(request, path, entry, True)

    def _enter(self, request: Request, path: str, entry: Entry, fresh: bool) -> bool:
        old = self._nodes.by_path.get(path)
        if old is not None:
            self._changes.replace(old, entry.attributes)
        return self._give(request, self._know(path, entry, fresh))

    def _know(self, path: str, entry: Entry, fresh: bool) -> Node:
        return self._nodes.enter(path, [entry.attributes, entry.target, entry.digest, fresh, entry.capability])

    def _give(self, request: Request, node: Node) -> bool:
        assert node.attributes is not None
        if self._core.wanted(request):
            self._nodes.looked_up(node)
            self._core.reply(request, fuse.entry_out(node.number, 0, node.attributes, VALID if node.fresh else 0))
        return True

    def _lookup_far(self, request: Request, remote: Remote) -> None:
        with self._core.lock:
            path, epoch = self._core.child(request), self._changes.epoch
            directory = _split(path)[0]
            due = self._changes.beside.is_due(directory)
        if due and self._look_beside(request, directory, remote):
            return
        try:
            entry, watched = remote.look(path)
        except Refused as refusal:
            if refusal.errno != ENOENT:
                raise
            with self._core.lock:
                self._give_nothing(request, path, self._changes.may_keep(directory, epoch))
            return
        with self._core.lock:
            self._enter(request, path, entry, watched and self._changes.may_keep(directory, epoch))

    def _look_beside(self, request: Request, directory: str, remote: Remote) -> bool:
        """Ask for all that is in a directory; whether the request is answered by that."""
        epoch = self._changes.epoch
        try:
            entries, watched = remote.beside(directory)
        except Refused:
            return False  # it has gone; `look` will say so
        with self._core.lock:
            if not self._changes.may_keep(directory, epoch):
                return False
            self._changes.beside.keep(directory, entries if watched else None)
            return self._lookup(request)

    def _give_nothing(self, request: Request, path: str, keep: bool) -> None:
        absent = self._changes.absent
        self._nodes.detach(path)
        keep = keep and len(absent) < ABSENT_KEPT
        if keep:
            absent.add(path)
        self._core.reply(request, fuse.entry_out(0, 0, None, VALID if keep else 0))

    def _forget(self, request: Request) -> bool:
        self._nodes.forget(request.node, *fuse.FORGET_IN.unpack_from(request.body))
        return True

    def _forget_many(self, request: Request) -> bool:
        count, _ = fuse.BATCH_IN.unpack_from(request.body)
        for index in range(count):
            self._nodes.forget(*fuse.FORGET_ONE.unpack_from(request.body, fuse.BATCH_IN.size + index * 16))
        return True

    # -- attributes --------------------------------------------------------------------------------

    def _getattr(self, request: Request) -> bool:
        node = self._core.node(request)
        gone = self._nodes.by_path.get(node.path) is not node  # it stays what it was
        if node.attributes is None or not (node.fresh or gone):
            return False
        return self._core.reply(request, fuse.attr_out(node.attributes, VALID))

    def _getattr_far(self, request: Request, remote: Remote) -> None:
        with self._core.lock:
            node, epoch = self._core.node(request), self._changes.epoch
        try:
            entry, watched = remote.look(node.path)
        except Refused:
            if node.attributes is None:
                raise
            self._core.reply(request, fuse.attr_out(node.attributes, 0))
            return
        with self._core.lock:
            if not self._changes.replace(node, entry.attributes):
                fresh = watched and self._changes.may_keep(_split(node.path)[0], epoch)
                self._know(node.path, entry, fresh)
            assert node.attributes is not None
            self._core.reply(request, fuse.attr_out(node.attributes, VALID if node.fresh else 0))

    def _readlink(self, request: Request) -> bool:
        target = self._core.node(request).target
        return bool(target) and self._core.reply(request, os.fsencode(target))

    def _readlink_far(self, request: Request, remote: Remote) -> None:
        self._core.reply(request, os.fsencode(remote.look(self._core.node(request).path)[0].target))

    def _getxattr(self, request: Request) -> bool:
        size, _ = fuse.XATTR_IN.unpack_from(request.body)
        node = self._core.node(request)
        known = {b"security.capability": node.capability, DIGEST: node.digest.encode()}
        value = known.get(request.body[fuse.XATTR_IN.size :].rstrip(b"\0"), b"")
        if not value:
            return self._core.refuse(request, ENODATA)
        return self._core.reply(request, value if size else len(value).to_bytes(8, "little"))

    # -- directories -------------------------------------------------------------------------------

    def _opendir(self, request: Request) -> bool:
        node = self._core.node(request)
        if node.listing is None:
            return False
        return self._core.reply(request, fuse.open_out(node.number, fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE))

    def _opendir_far(self, request: Request, remote: Remote) -> None:
        with self._core.lock:
            node, epoch = self._core.node(request), self._changes.epoch
        # Who lists a directory mostly looks up what is there next.
        entries, watched = remote.beside(node.path)
        listing = _listing(entries) if entries is not None else None
        if listing is None:
            listing, watched = remote.names(node.path)
        with self._core.lock:
            keep = watched and self._changes.may_keep(node.path, epoch)
            if keep:
                self._changes.beside.keep(node.path, entries)
            node.listing = listing if keep else None
            node.reading = listing
            self._core.reply(request, fuse.open_out(node.number, fuse.FOPEN_CACHE_DIR if keep else 0))

    def _readdir(self, request: Request) -> bool:
        node = self._core.node(request)
        _, offset, size, *_ = fuse.READ_IN.unpack_from(request.body)
        listing = node.listing if node.listing is not None else node.reading
        out, used = [], 0
        for index in range(offset, len(listing)):
            name, kind = listing[index]
            item = fuse.dirent(index + 2, index + 1, os.fsencode(name), kind)
            used += len(item)
            if used > size:
                break
            out.append(item)
        return self._core.reply(request, b"".join(out))


def _listing(entries: dict[str, Entry | None]) -> list[tuple[str, int]] | None:
    """Names and types; None where one is not known."""
    found = [(name, entry.attributes.mode >> 12) for name, entry in entries.items() if entry is not None]
    return found if len(found) == len(entries) else None


def _split(path: str) -> tuple[str, str]:
    directory, _, name = path.rpartition("/")
    return directory or "/", name
