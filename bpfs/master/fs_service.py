# SPDX-License-Identifier: GPL-2.0-or-later
"""The master's half of the nodes' /bpfs: does on the local tree what `bpfs.slave.remote_tree` asks for.

The kernel of the node has judged the modes, with the owners and bits that it was given from here. Which node calls is
known from the link, never from the message.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from errno import EBADF, EINTR, EINVAL, ENOSYS
from typing import Any

import trio

from bpfs.errors import BpfsError
from bpfs.nodes.registry import Node, NodeTable
from bpfs.tree.base import Attributes, Caller, Changes, Handle, Tree
from bpfs.wire.messages import FsReply, FsRequest

MAX_READ = 1 << 19
"""Bytes of one read at most: half a frame of the wire."""

MAX_FILES = 10_000
"""Files that a node may have open; a node that never closes any harms only itself."""


@dataclass(slots=True)
class _File:
    node: int
    handle: Handle
    # The writes that wait now, so that an interrupted writer can be let go.
    writes: set[trio.CancelScope] = field(default_factory=set)


class FsService:
    """Serves all nodes; `serve` is the handler of `FsRequest`.

    Args:
        tree: what is shown to them.
        nodes: tells when a node has gone, whose files are closed then.
        nursery: where that is done.
        generation: of this master: no file has the number that one of an earlier master's had.
    """

    def __init__(self, tree: Tree, nodes: NodeTable, nursery: trio.Nursery, generation: int = 0) -> None:
        self._tree = tree
        self._nursery = nursery
        self._numbers = itertools.count((generation << 32) + 1)
        self._files: dict[int, _File] = {}
        self._operations: dict[str, Callable[[FsRequest, Caller], Awaitable[FsReply]]] = {
            "getattr": self._getattr,
            "listdir": self._listdir,
            "readlink": self._readlink,
            "setattr": self._setattr,
            "getxattr": self._getxattr,
            "listxattr": self._listxattr,
            "setxattr": self._setxattr,
            "open": self._open,
            "read": self._read,
            "write": self._write,
            "interrupt": self._interrupt,
            "close": self._close,
        }
        nodes.listen(self._hear)

    async def serve(self, node: Node, request: FsRequest) -> FsReply:
        """Does what a slave asks for.

        Raises:
            BpfsError: for the caller on the node.
        """
        operation = self._operations.get(request.op)
        if operation is None:
            raise BpfsError(ENOSYS, f"'{request.op[:40]}' is no operation of a tree")
        return await operation(request, Caller(request.pid, request.uid, request.gid, int(node.number)))

    def _hear(self, node: Node, what: str) -> None:
        if what == "state" and node.session is None:
            for number, file in list(self._files.items()):
                if file.node == node.number:
                    del self._files[number]
                    self._nursery.start_soon(file.handle.close, name=f"close a file of node {node.number}")

    def _file(self, request: FsRequest, caller: Caller) -> _File:
        file = self._files.get(request.handle)
        if file is None or file.node != caller.node:
            raise BpfsError(EBADF, "this file is not open at the master")
        return file

    # -- names ------------------------------------------------------------------------------------------------

    async def _getattr(self, request: FsRequest, caller: Caller) -> FsReply:
        return FsReply(value=_plain(await self._tree.getattr(request.path, caller)))

    async def _listdir(self, request: FsRequest, caller: Caller) -> FsReply:
        listing = await self._tree.listdir(request.path, caller)
        return FsReply(value=[[name, _plain(attributes)] for name, attributes in listing])

    async def _readlink(self, request: FsRequest, caller: Caller) -> FsReply:
        return FsReply(data=(await self._tree.readlink(request.path, caller)).encode())

    async def _setattr(self, request: FsRequest, caller: Caller) -> FsReply:
        return FsReply(value=_plain(await self._tree.setattr(request.path, caller, _changes(request.value))))

    async def _getxattr(self, request: FsRequest, caller: Caller) -> FsReply:
        return FsReply(data=await self._tree.getxattr(request.path, caller, str(request.value)))

    async def _listxattr(self, request: FsRequest, caller: Caller) -> FsReply:
        return FsReply(value=list(await self._tree.listxattr(request.path, caller)))

    async def _setxattr(self, request: FsRequest, caller: Caller) -> FsReply:
        match request.value:
            case [str(name), bytes() | None as value]:
                await self._tree.setxattr(request.path, caller, name, value)
            case _:
                raise BpfsError(EINVAL, "this is no attribute with its value")
        return FsReply()

    # -- files ------------------------------------------------------------------------------------------------

    async def _open(self, request: FsRequest, caller: Caller) -> FsReply:
        if sum(file.node == caller.node for file in self._files.values()) >= MAX_FILES:
            raise BpfsError(EBADF, f"node {caller.node} has {MAX_FILES} files open")
        handle = await self._tree.open(request.path, caller, request.size)
        number = next(self._numbers)
        self._files[number] = _File(caller.node, handle)
        return FsReply(handle=number, value=handle.blocking)

    async def _read(self, request: FsRequest, caller: Caller) -> FsReply:
        if request.offset < 0 or request.size < 0:
            raise BpfsError(EINVAL, "there is nothing before the beginning of a file")
        file = self._file(request, caller)
        return FsReply(data=await file.handle.read(request.offset, min(request.size, MAX_READ)))

    async def _write(self, request: FsRequest, caller: Caller) -> FsReply:
        file = self._file(request, caller)
        with trio.CancelScope() as scope:
            file.writes.add(scope)
            try:
                # Returns early where the handler answered early: the reply is that answer.
                await file.handle.write(request.offset, request.data, caller)
                return FsReply()
            finally:
                file.writes.discard(scope)
        raise BpfsError(EINTR, "interrupted")

    async def _interrupt(self, request: FsRequest, caller: Caller) -> FsReply:
        file = self._file(request, caller)
        if file.handle.may_interrupt():
            for scope in file.writes:
                scope.cancel()
        return FsReply()

    async def _close(self, request: FsRequest, caller: Caller) -> FsReply:
        file = self._file(request, caller)
        del self._files[request.handle]
        await file.handle.close()
        return FsReply()


def _plain(attributes: Attributes) -> list[Any]:
    return [
        attributes.mode,
        attributes.uid,
        attributes.gid,
        attributes.size,
        attributes.mtime_ns,
        attributes.control,
        hash(attributes.identity),
    ]


def _changes(value: Any) -> Changes:
    """What chown or chmod on a node wants, checked: it comes from another machine.

    Raises:
        BpfsError: EINVAL.
    """
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(isinstance(x, int | None) for x in value):
        raise BpfsError(EINVAL, "these are no owner, group and mode")
    if not all(x is None or 0 <= x < 1 << 32 for x in value):
        raise BpfsError(EINVAL, "owner, group or mode out of range")
    return Changes(*value)
