# SPDX-License-Identifier: GPL-2.0-or-later
"""The node's own /bpfs: every operation is asked of the master over the slave's link.

Nothing is cached here: what a process of a node reads is as fresh as what one of the master reads. A write returns
when the master answers it, be it early (the writer itself is about to move) or when the thing is done. When the link
is gone everything fails at once with EHOSTDOWN.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from errno import EHOSTDOWN, EPROTO
from typing import Any

from bpfs.errors import BpfsError, LinkClosed
from bpfs.slave.line import Line
from bpfs.tree.base import Attributes, Caller, Changes, Handle, Listener, Path, one_line
from bpfs.tree.callers import job_process_of
from bpfs.tree.mount import FuseMount, mount
from bpfs.wire.messages import FsReply, FsRequest

TIMEOUT = 10.0
"""Seconds that the master may take for what does not wait for anything: names, attributes, contents."""

CHUNK = 1 << 18
"""Bytes asked for at once; a longer read comes out short, as reads may."""


class RemoteTree:
    """The master's tree, as seen over a link."""

    def __init__(self, link: Line) -> None:
        self._link = link

    def listen(self, listener: Listener) -> None:
        """Nothing is lasting here, so there is nothing to tell."""

    async def getattr(self, path: Path, caller: Caller) -> Attributes:
        """See `Tree`."""
        return _attributes((await self._ask("getattr", caller, path)).value)

    async def listdir(self, path: Path, caller: Caller) -> Sequence[tuple[str, Attributes]]:
        """See `Tree`."""
        reply = await self._ask("listdir", caller, path)
        try:
            return [(str(name), _attributes(value)) for name, value in reply.value]
        except (TypeError, ValueError):
            raise BpfsError(EPROTO, "the master sent a listing that is none") from None

    async def readlink(self, path: Path, caller: Caller) -> str:
        """See `Tree`."""
        return (await self._ask("readlink", caller, path)).data.decode()

    async def open(self, path: Path, caller: Caller, flags: int) -> Handle:
        """See `Tree`."""
        reply = await self._ask("open", caller, path, size=flags)
        return RemoteHandle(self, reply.handle, blocking=bool(reply.value))

    async def setattr(self, path: Path, caller: Caller, changes: Changes) -> Attributes:
        """See `Tree`."""
        value = [changes.uid, changes.gid, changes.mode]
        return _attributes((await self._ask("setattr", caller, path, value=value)).value)

    async def getxattr(self, path: Path, caller: Caller, name: str) -> bytes:
        """See `Tree`."""
        return (await self._ask("getxattr", caller, path, value=name)).data

    async def listxattr(self, path: Path, caller: Caller) -> Sequence[str]:
        """See `Tree`."""
        reply = await self._ask("listxattr", caller, path)
        return [str(name) for name in reply.value or ()]

    async def setxattr(self, path: Path, caller: Caller, name: str, value: bytes | None) -> None:
        """See `Tree`."""
        await self._ask("setxattr", caller, path, value=[name, value])

    async def _ask(self, op: str, caller: Caller, path: Path, size: int = 0, value: Any = None) -> FsReply:
        return await self.request(_request(op, caller, path=path, size=size, value=value), TIMEOUT)

    async def request(self, message: FsRequest, timeout: float | None) -> FsReply:
        """One operation.

        Raises:
            BpfsError: the master's errno; EHOSTDOWN without a link; ETIMEDOUT.
        """
        try:
            reply = await self._link.request(message, timeout)
        except LinkClosed as error:
            raise BpfsError(EHOSTDOWN, error.sentence) from None
        if not isinstance(reply, FsReply):
            raise BpfsError(EPROTO, f"the master answered with {type(reply).__name__}")
        return reply

    def tell(self, message: FsRequest) -> None:
        """Like `request`, without an answer."""
        try:
            self._link.notify_nowait(message)
        except LinkClosed:
            pass  # the master has closed all our files then


_NOBODY = Caller(0, 0, 0)


def _request(
    op: str,
    caller: Caller = _NOBODY,
    *,
    path: Path = (),
    handle: int = 0,
    offset: int = 0,
    size: int = 0,
    data: bytes = b"",
    value: Any = None,
) -> FsRequest:
    return FsRequest(op, path, handle, offset, size, data, caller.pid, caller.uid, caller.gid, value)


def _attributes(value: Any) -> Attributes:
    try:
        if not all(isinstance(number, int) for number in value):
            raise ValueError
        mode, uid, gid, size, mtime_ns, control, identity = value
        return Attributes(mode, uid, gid, size, mtime_ns, identity, control=bool(control))
    except (TypeError, ValueError):
        raise BpfsError(EPROTO, "the master sent attributes that are none") from None


class RemoteHandle:
    """A file that is open at the master."""

    def __init__(self, tree: RemoteTree, number: int, blocking: bool) -> None:
        self._tree = tree
        self._number = number
        self._blocking = blocking
        self._writes = 0
        self._end: int | None = None  # of the content, once a read has reached it

    @property
    def blocking(self) -> bool:
        """See `Handle`."""
        return self._blocking

    def may_interrupt(self) -> bool:
        """See `Handle`. Whether a write may be interrupted only its handler knows: it is told, and ends it if so."""
        if self._writes:
            self._tree.tell(_request("interrupt", handle=self._number))
        return not self._writes

    async def read(self, offset: int, size: int) -> bytes:
        """See `Handle`."""
        if self._blocking:
            return (await self._read(offset, size, None)).data
        # The master keeps the content that the first read found until the beginning is read again, so its end is known.
        if self._end is not None and offset >= self._end > 0:
            return b""
        size = min(size, CHUNK)
        data = (await self._read(offset, size, TIMEOUT)).data
        self._end = offset + len(data) if len(data) < size else None
        return data

    async def _read(self, offset: int, size: int, timeout: float | None) -> FsReply:
        return await self._tree.request(_request("read", handle=self._number, offset=offset, size=size), timeout)

    async def write(self, offset: int, data: bytes, caller: Caller) -> int:
        """See `Handle`."""
        one_line(data)  # nonsense, however long, need not travel
        self._writes += 1
        try:
            await self._tree.request(_request("write", caller, handle=self._number, data=data), None)
        finally:
            self._writes -= 1
        return len(data)

    async def close(self) -> None:
        """See `Handle`."""
        self._tree.tell(_request("close", handle=self._number))


@asynccontextmanager
async def mounted(link: Line, mountpoint: str) -> AsyncIterator[FuseMount]:
    """The master's tree at `mountpoint`, as long as the context lasts.

    Args:
        link: has to be served already; where it ends, everything in the tree fails with EHOSTDOWN.
        mountpoint: an existing directory.

    Raises:
        BpfsError: it cannot be mounted.
    """
    async with mount(RemoteTree(link), mountpoint, identify=job_process_of) as mounted_tree:
        yield mounted_tree
