# SPDX-License-Identifier: GPL-2.0-or-later
"""A tree made of tables: the master's own /bpfs.

Everything here runs on one trio thread. Looking up and reading plain functions never waits, so a lookup is one
consistent glance at the tables' objects.
"""

from __future__ import annotations

import logging
import stat
import time
from collections.abc import Sequence
from errno import EACCES, EINTR, EINVAL, EIO, EISDIR, ENOENT, ENOTDIR, EOPNOTSUPP, EPERM
from inspect import isawaitable
from typing import Any, NamedTuple

import trio

from bpfs.errors import BpfsError
from bpfs.tree.base import Attributes, Caller, Changes, Handle, Listener, Path, WriteRequest, one_line
from bpfs.tree.entries import Access, Collection, Content, Directory, Entry, File, Link, Notes, Stream, Table

log = logging.getLogger(__name__)

_STARTED_NS = time.time_ns()


class _Node(NamedTuple):
    """A place in the tree: an entry, and the object that its functions get."""

    entry: Entry[Any]
    target: Any
    # Set for a member of a collection (then `entry` is the collection and `target` the member's object).
    member: bool = False

    @property
    def table(self) -> Table[Any] | None:
        """The table of a directory that has one."""
        if self.member:
            return self.entry.table if isinstance(self.entry, Collection) and self.entry.link is None else None
        return self.entry.table if isinstance(self.entry, Directory) else None


class LocalTree:
    """The tree of a table.

    Args:
        table: the root directory's.
        target: the object its functions get.
        nursery: where write handlers run; they outlive the write that started them (early answer, interrupted writer).
    """

    def __init__(self, table: Table[Any], target: Any, nursery: trio.Nursery) -> None:
        self._root = _Node(Directory("", "the root", table), target)
        self._nursery = nursery
        self._listeners: list[Listener] = []

    # -- changes -------------------------------------------------------------------------------------------------------

    def listen(self, listener: Listener) -> None:
        """Has `listener` called with every change."""
        self._listeners.append(listener)

    def changed(self, *path: str) -> None:
        """Owner, group or mode of `path` or of something below it changed. Call it right after the change."""
        for listener in self._listeners:
            listener(path, False)

    def gone(self, *path: str) -> None:
        """`path` is no more, or means something else now. Call it right after the change."""
        for listener in self._listeners:
            listener(path, True)

    # -- operations ----------------------------------------------------------------------------------------------------

    async def getattr(self, path: Path, caller: Caller) -> Attributes:
        """See `Tree`."""
        return self._attributes(self._find(path), caller)

    async def listdir(self, path: Path, caller: Caller) -> Sequence[tuple[str, Attributes]]:
        """See `Tree`."""
        node = self._find(path)
        if node.table is not None:
            children = [(entry.name, _child(entry, node.target)) for entry in node.table]
        elif isinstance(node.entry, Collection) and not node.member:
            members = ((name, node.entry.lookup(node.target, name)) for name in node.entry.names(node.target))
            children = [(entry.name, _child(entry, node.target)) for entry in node.entry.fixed or ()]
            children += [(name, _Node(node.entry, found, member=True)) for name, found in members if found is not None]
        else:
            raise BpfsError(ENOTDIR, f"/{'/'.join(path)} is no directory")
        return [(name, self._attributes(child, caller)) for name, child in children]

    async def readlink(self, path: Path, caller: Caller) -> str:
        """See `Tree`."""
        node = self._find(path)
        target = self._link_target(node, caller)
        if target is None:
            raise BpfsError(EINVAL, f"/{'/'.join(path)} is no symbolic link")
        return target

    async def open(self, path: Path, caller: Caller, flags: int) -> Handle:
        """See `Tree`."""
        node = self._find(path)
        if not isinstance(node.entry, File):
            raise BpfsError(EISDIR, f"/{'/'.join(path)} is no file")
        return _Opened(path, node.entry, node.target, self._nursery)

    async def setattr(self, path: Path, caller: Caller, changes: Changes) -> Attributes:
        """See `Tree`."""
        node = self._find(path)
        change = node.entry.member_change if isinstance(node.entry, Collection) and node.member else None
        if change is None:
            raise BpfsError(EPERM, f"owner and mode of /{'/'.join(path)} are fixed")
        result = change(node.target, caller, changes)
        if isawaitable(result):
            await result
        return self._attributes(self._find(path), caller)

    # -- extended attributes -------------------------------------------------------------------------------------------

    async def getxattr(self, path: Path, caller: Caller, name: str) -> bytes:
        """See `Tree`."""
        notes, target = self._notes(path, name)
        return notes.get(target, name)

    async def listxattr(self, path: Path, caller: Caller) -> Sequence[str]:
        """See `Tree`."""
        node = self._find(path)
        notes = node.entry.member_notes if isinstance(node.entry, Collection) and node.member else None
        return notes.names(node.target) if notes is not None else []

    async def setxattr(self, path: Path, caller: Caller, name: str, value: bytes | None) -> None:
        """See `Tree`."""
        notes, target = self._notes(path, name)
        if value is None:
            notes.remove(target, caller, name)
        else:
            notes.set(target, caller, name, value)

    def _notes(self, path: Path, name: str) -> tuple[Notes, Any]:
        node = self._find(path)
        notes = node.entry.member_notes if isinstance(node.entry, Collection) and node.member else None
        if notes is None or not name.startswith(notes.prefix):
            raise BpfsError(EOPNOTSUPP, f"/{'/'.join(path)} has no attribute {name[:40]}")
        return notes, node.target

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _find(self, path: Path) -> _Node:
        node = self._root
        for name in path:
            table = node.table
            if table is not None:
                entry = table.get(name)
                if entry is None:
                    raise BpfsError(ENOENT, f"there is no /{'/'.join(path)}")
                node = _child(entry, node.target)
            elif isinstance(node.entry, Collection) and not node.member:
                node = _member(node, name, path)
            else:
                raise BpfsError(ENOTDIR, f"/{'/'.join(path)} leads through something that is no directory")
        return node

    def _link_target(self, node: _Node, caller: Caller) -> str | None:
        if isinstance(node.entry, Link):
            return node.entry.target(node.target, caller)
        if isinstance(node.entry, Collection) and node.member and node.entry.link is not None:
            return node.entry.link(node.target, caller)
        return None

    def _attributes(self, node: _Node, caller: Caller) -> Attributes:
        entry, target = node.entry, node.target
        link = self._link_target(node, caller)
        if link is not None:
            # Where `self` points depends on who asks, so links are asked for each time; they cost next to nothing.
            return Attributes(stat.S_IFLNK | 0o777, size=len(link.encode()), mtime_ns=_STARTED_NS)
        if isinstance(entry, Collection) and node.member:
            access = entry.member_access(target) if entry.member_access is not None else Access(mode=0o555)
            key = entry.member_key(target) if entry.member_key is not None else target
            return _directory(access, entry.member_lasting, key)
        access = entry.access(target) if entry.access is not None else Access(mode=entry.mode)
        if not isinstance(entry, File):
            return _directory(access, entry.lasting)
        return Attributes(
            stat.S_IFREG | access.mode,
            access.uid,
            access.gid,
            size=_size(entry, target),
            mtime_ns=_STARTED_NS,
            lasting=entry.lasting,
            control=entry.write is not None,
        )


def _member(node: _Node, name: str, path: Path) -> _Node:
    collection = node.entry
    assert isinstance(collection, Collection)
    fixed = collection.fixed.get(name) if collection.fixed is not None else None
    if fixed is not None:
        return _child(fixed, node.target)
    found = collection.lookup(node.target, name)
    if found is None:
        raise BpfsError(ENOENT, f"there is no /{'/'.join(path)}")
    return _Node(collection, found, member=True)


def _child(entry: Entry[Any], target: Any) -> _Node:
    if isinstance(entry, Directory) and entry.bind is not None:
        return _Node(entry, entry.bind(target))
    return _Node(entry, target)


def _directory(access: Access, lasting: bool, identity: object = None) -> Attributes:
    return Attributes(
        stat.S_IFDIR | access.mode, access.uid, access.gid, mtime_ns=_STARTED_NS, identity=identity, lasting=lasting
    )


def _size(entry: File[Any], target: Any) -> int:
    if entry.read is None or not entry.sized:
        return 0
    content = entry.read(target)
    return len(_encode(content)) if isinstance(content, str | bytes) else 0


def _encode(content: Content) -> bytes:
    return content.encode() if isinstance(content, str) else content


class _Opened:
    """An open file of a `LocalTree`."""

    def __init__(self, path: Path, entry: File[Any], target: Any, nursery: trio.Nursery) -> None:
        self._path = path
        self._entry = entry
        self._target = target
        self._nursery = nursery
        self._content: bytes | None = None
        self._rest = b""  # of a stream: what the last read had no room for
        self._request: WriteRequest | None = None  # the write that waits now
        self._reading = trio.Lock()
        self._writing = trio.Lock()
        # From the opening on: events between open(2) and the first read(2) are not lost.
        self._stream: Stream | None = entry.follow(target) if entry.follow is not None else None

    @property
    def blocking(self) -> bool:
        """Whether reads may wait."""
        return self._stream is not None or self._entry.blocks

    def may_interrupt(self) -> bool:
        """See `Handle`."""
        return self._request is None or self._request.may_interrupt

    async def read(self, offset: int, size: int) -> bytes:
        """See `Handle`. A file is read as it was when its beginning was read, so that two reads never tear it."""
        if self._stream is not None:
            async with self._reading:
                return await self._read_stream(self._stream, size)
        if offset == 0 or self._content is None:
            self._content = await self._read_content()
        return self._content[offset : offset + size]

    async def _read_content(self) -> bytes:
        if self._entry.read is None:
            raise BpfsError(EACCES, f"/{'/'.join(self._path)} cannot be read")
        content = self._entry.read(self._target)
        if not isinstance(content, str | bytes):
            content = await content
        return _encode(content)

    async def _read_stream(self, stream: Stream, size: int) -> bytes:
        if not self._rest:
            try:
                self._rest = _encode(await stream.__anext__())
            except StopAsyncIteration:
                return b""
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    async def write(self, offset: int, data: bytes, caller: Caller) -> int:
        """See `Handle`. The offset means nothing: a write is a verb, appended or not."""
        if self._entry.write is None:
            raise BpfsError(EACCES, f"/{'/'.join(self._path)} cannot be written")
        request = WriteRequest(caller, one_line(data, self._entry.limit))
        async with self._writing:
            await self.submit(request)
        return len(data)

    async def submit(self, request: WriteRequest) -> None:
        """Runs the handler until it is done or has answered; being cancelled leaves it running."""
        outcome: list[BpfsError] = []
        self._nursery.start_soon(self._handle, request, outcome, name=f"write {'/'.join(self._path)}")
        self._request = request
        try:
            await request.wait_answered()
        except trio.Cancelled:
            request.interrupted.set()
            raise
        finally:
            self._request = None
        if outcome:
            raise outcome[0]

    async def _handle(self, request: WriteRequest, outcome: list[BpfsError]) -> None:
        assert self._entry.write is not None
        where = "/".join(self._path)
        try:
            result = self._entry.write(self._target, request)
            if isawaitable(result):
                await result
        except OSError as error:
            refusal = error if isinstance(error, BpfsError) else BpfsError(error.errno or EIO, str(error))
            who = request.caller
            log.info("%s: '%s' by pid %d uid %d: %s", where, request.text[:80], who.pid, who.uid, refusal)
            outcome.append(refusal)
        except Exception:
            log.exception("%s: '%s' failed in an unforeseen way", where, request.text[:80])
            outcome.append(BpfsError(EIO, "an error in the daemon; see its log"))
        except trio.Cancelled:
            outcome.append(BpfsError(EINTR, "the daemon ends"))
            raise
        finally:
            await request.answer()

    async def close(self) -> None:
        """See `Handle`."""
        if self._stream is not None:
            await self._stream.aclose()
