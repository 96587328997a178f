# SPDX-License-Identifier: GPL-2.0-or-later
"""FUSE operations on a tree: where inodes become paths, errors become errno, and waiting callers can be interrupted.

What the kernel may keep is told by `Attributes.lasting`; contents are never kept (direct_io), since nobody may read a
value older than the last change. Every exception ends here: one that reached pyfuse3 would end the mount.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from errno import EINTR, EINVAL, EIO, ENOENT, ENOSYS, EOPNOTSUPP, EPERM, ESTALE
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from bpfs.errors import BpfsError
from bpfs.tree.base import Attributes, Caller, Changes, Handle, Path, Tree
from bpfs.tree.callers import Watch, find_waiter
from bpfs.tree.inodes import Inode, InodeTable
from bpfs.tree.notify import Notifier

log = logging.getLogger(__name__)

_FOREVER = 365 * 86400
"""Seconds; the kernel turns timeouts into jiffies, so infinity has no meaning there."""

_SAME_CALL_S = 0.005
"""Seconds within which a thread's request for what it has just looked up belongs to the same system call."""

_ATTRIBUTES = b"bproc."
"""What extended attributes of ours begin with."""

P = ParamSpec("P")
R = TypeVar("R")


def _to_errno(
    operation: Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]]:
    """The edge: what an operation raises becomes an errno for the caller."""

    async def guarded(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.busy += 1
        try:
            return await operation(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or EIO) from None
        except Exception:
            log.exception("%s failed in an unforeseen way", operation.__name__)
            raise pyfuse3.FUSEError(EIO) from None
        finally:
            self.busy -= 1

    functools.update_wrapper(guarded, operation)
    return guarded


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise pyfuse3.FUSEError(EINVAL) from None


@dataclass(slots=True)
class _Open:
    """An open file, and who opened it."""

    handle: Handle
    inode: int
    opener: int  # a thread's id
    caller: Caller


@dataclass(slots=True)
class _OpenDirectory:
    inode: Inode
    caller: Caller
    # Attributes as of the listing, and how many changes there had been by then.
    listed: Sequence[tuple[str, Attributes]]
    changes: int


class Operations(pyfuse3.Operations):
    """The operations that pyfuse3 calls. See `FuseMount` for the arguments."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, tree: Tree, notifier: Notifier, node: int, identify: Callable[[int], int]) -> None:
        super().__init__()
        self.inodes = InodeTable()
        self.watch = Watch()
        self.busy = 0  # requests under way, without those that wait for something to happen
        self.vanished = 0  # requests that were gone when they were read
        self._tree = tree
        self._notifier = notifier
        self._node = node
        self._identify = identify
        self._numbers = itertools.count(1)
        self._files: dict[int, _Open] = {}
        self._directories: dict[int, _OpenDirectory] = {}
        self._changes = 0
        self._sent_back: set[int] = set()
        # What a thread was told by its last lookup. The kernel asks for attributes that are not to be kept a second
        # time, to check permission within the same system call; that needs no second answer of the tree.
        self._looked_up: dict[int, tuple[int, Attributes | None, float]] = {}
        tree.listen(self._hear)

    # -- changes of the tree -------------------------------------------------------------------------------------------

    def _hear(self, path: Path, gone: bool) -> None:
        self._changes += 1
        inode = self.inodes.find(path)
        if inode is not None and not gone:
            for known in inode.below():
                self._notifier.attributes(known.number)
        if gone:
            parted = self.inodes.part(path)
            if parted is not None:
                self._notifier.name(*parted)

    def statistics(self) -> dict[str, int]:
        """See `FuseMount.statistics`."""
        return {
            "inodes": len(self.inodes),
            "files": len(self._files),
            "directories": len(self._directories),
            "vanished": self.vanished,
        }

    # -- names and attributes ------------------------------------------------------------------------------------------

    def _inode(self, number: int) -> Inode:
        inode = self.inodes[number]
        if inode.gone:
            raise pyfuse3.FUSEError(ENOENT)
        return inode

    def _caller(self, context: Any) -> Caller:
        # The pid costs a look at /proc, so it is found only where it matters: for writes (see `write`).
        return Caller(0, context.uid, context.gid, self._node)

    @_to_errno
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> Any:
        """See pyfuse3."""
        parent = self._inode(parent_inode)
        text = os.fsdecode(name)
        if text in (".", ".."):
            raise pyfuse3.FUSEError(ENOENT)
        attributes = await self._tree.getattr((*parent.path, text), self._caller(ctx))
        number = self.inodes.look_up(parent, text, attributes).number
        if not attributes.lasting:
            if len(self._looked_up) > 1000:
                self._looked_up.clear()
            self._looked_up[ctx.pid] = (number, attributes, time.monotonic() + _SAME_CALL_S)
        return _entry(number, attributes)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """See pyfuse3."""
        for number, count in inode_list:
            self.inodes.forget(number, count)

    @_to_errno
    async def getattr(self, inode: int, ctx: Any) -> Any:
        """See pyfuse3."""
        number, attributes, until = self._looked_up.pop(ctx.pid, (0, None, 0.0))
        if attributes is None or number != inode or time.monotonic() > until:
            attributes = await self._tree.getattr(self._inode(inode).path, self._caller(ctx))
        return _entry(inode, attributes)

    @_to_errno
    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        """See pyfuse3. Truncation and times are accepted and mean nothing: a shell's ``>`` truncates first."""
        path, caller = self._inode(inode).path, self._caller(ctx)
        if fields.update_uid or fields.update_gid or fields.update_mode:
            changes = Changes(
                uid=attr.st_uid if fields.update_uid else None,
                gid=attr.st_gid if fields.update_gid else None,
                mode=attr.st_mode & 0o7777 if fields.update_mode else None,
            )
            await self._tree.setattr(path, caller, changes)
        return _entry(inode, await self._tree.getattr(path, caller))

    # -- extended attributes -------------------------------------------------------------------------------------------

    @_to_errno
    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        """See pyfuse3."""
        # Programs like ls ask for these of every file; the answer makes them ask no more.
        if not name.startswith(_ATTRIBUTES):
            raise pyfuse3.FUSEError(EOPNOTSUPP)
        return await self._tree.getxattr(self._inode(inode).path, self._caller(ctx), _text(name))

    @_to_errno
    async def listxattr(self, inode: int, ctx: Any) -> list[bytes]:
        """See pyfuse3."""
        return [os.fsencode(name) for name in await self._tree.listxattr(self._inode(inode).path, self._caller(ctx))]

    @_to_errno
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        """See pyfuse3."""
        if not name.startswith(_ATTRIBUTES):
            raise pyfuse3.FUSEError(EOPNOTSUPP)
        await self._tree.setxattr(self._inode(inode).path, self._caller(ctx), _text(name), bytes(value))

    @_to_errno
    async def removexattr(self, inode: int, name: bytes, ctx: Any) -> None:
        """See pyfuse3."""
        if not name.startswith(_ATTRIBUTES):
            raise pyfuse3.FUSEError(EOPNOTSUPP)
        await self._tree.setxattr(self._inode(inode).path, self._caller(ctx), _text(name), None)

    @_to_errno
    async def readlink(self, inode: int, ctx: Any) -> bytes:
        """See pyfuse3."""
        return os.fsencode(await self._tree.readlink(self._inode(inode).path, self._caller(ctx)))

    # -- directories ---------------------------------------------------------------------------------------------------

    @_to_errno
    async def opendir(self, inode: int, ctx: Any) -> int:
        """See pyfuse3."""
        directory, caller = self._inode(inode), self._caller(ctx)
        changes = self._changes
        listed = await self._tree.listdir(directory.path, caller)
        number = next(self._numbers)
        self._directories[number] = _OpenDirectory(directory, caller, listed, changes)
        return number

    @_to_errno
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """See pyfuse3. Attributes are those of this moment: the kernel will keep them, so they must not be older."""
        opened = self._directories[fh]
        for place in range(start_id, len(opened.listed)):
            name, attributes = opened.listed[place]
            if opened.changes != self._changes:
                try:
                    attributes = await self._tree.getattr((*opened.inode.path, name), opened.caller)
                except BpfsError:
                    continue  # gone since the listing
            inode = self.inodes.look_up(opened.inode, name, attributes)
            if not pyfuse3.readdir_reply(token, os.fsencode(name), _entry(inode.number, attributes), place + 1):
                self.inodes.forget(inode.number, 1)
                return

    @_to_errno
    async def releasedir(self, fh: int) -> None:
        """See pyfuse3."""
        self._directories.pop(fh, None)

    # -- files ---------------------------------------------------------------------------------------------------------

    @_to_errno
    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        """See pyfuse3."""
        caller = self._caller(ctx)
        known = self._inode(inode)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self._take(known, ctx.pid)
        handle = await self._tree.open(known.path, caller, flags)
        number = next(self._numbers)
        self._files[number] = _Open(handle, inode, ctx.pid, caller)
        return pyfuse3.FileInfo(fh=number, direct_io=True, nonseekable=handle.blocking)

    def _take(self, inode: Inode, tid: int) -> None:
        """Gives a writer an inode for itself; see `InodeTable.take`."""
        if self.inodes.take(inode) or tid in self._sent_back:
            self._sent_back.discard(tid)
            return
        # Looked up before another writer took it. On ESTALE the kernel looks the name up again, once; whoever comes
        # to a taken inode twice in a row shares it.
        if len(self._sent_back) > 1000:
            self._sent_back.clear()  # of those who were killed on their way back
        self._sent_back.add(tid)
        raise pyfuse3.FUSEError(ESTALE)

    @_to_errno
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """See pyfuse3."""
        opened = self._files[fh]
        if not opened.handle.blocking:
            return await opened.handle.read(off, size)
        return await self._interruptible(opened, functools.partial(opened.handle.read, off, size))

    @_to_errno
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """See pyfuse3. Returns when the verb is done, or when its handler answered early."""
        opened = self._files[fh]
        writer = await find_waiter(opened.opener, opened.inode)
        caller = Caller(self._identify(writer) if writer else 0, opened.caller.uid, opened.caller.gid, self._node)
        written = await self._interruptible(
            opened, functools.partial(opened.handle.write, off, bytes(buf), caller), writer
        )
        # What the write changed must be what its writer sees next.
        await self._notifier.flush()
        return written

    async def _interruptible(self, opened: _Open, wait: Callable[[], Awaitable[R]], tid: int | None = None) -> R:
        """Runs `wait` until it is done or its caller has got a signal: then EINTR."""
        if tid is None:
            tid = await find_waiter(opened.opener, opened.inode) or opened.opener
        result: list[R] = []
        key = object()
        with trio.CancelScope() as scope:

            def interrupt() -> None:
                if opened.handle.may_interrupt():
                    scope.cancel()

            if tid:
                self.watch.add(key, tid, interrupt)
            self.busy -= 1
            try:
                result.append(await wait())
            finally:
                self.busy += 1
                self.watch.remove(key)
        if not result:
            raise BpfsError(EINTR, "interrupted")
        return result[0]

    async def flush(self, fh: int) -> None:
        """See pyfuse3. The kernel remembers ENOSYS: no more requests at close(2), which would cost a round trip."""
        raise pyfuse3.FUSEError(ENOSYS)

    @_to_errno
    async def release(self, fh: int) -> None:
        """See pyfuse3."""
        opened = self._files.pop(fh, None)
        if opened is not None:
            await opened.handle.close()

    @_to_errno
    async def statfs(self, ctx: Any) -> Any:
        """See pyfuse3. Nothing is stored here, as in /proc."""
        return pyfuse3.StatvfsData()


# Nothing is made or removed by hand in this tree; EPERM says so, where ENOSYS would sound like a defect.
async def _not_here(*_args: Any) -> Any:
    raise pyfuse3.FUSEError(EPERM)


for _name in ("mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "create"):
    setattr(Operations, _name, _not_here)


def _entry(number: int, attributes: Attributes) -> Any:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = number
    entry.st_mode = attributes.mode
    entry.st_nlink = 2 if attributes.is_dir else 1
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_size = attributes.size
    entry.st_blocks = 0
    entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = attributes.mtime_ns
    # A control file's name is looked up each time, since writers take its inodes; its attributes last.
    entry.entry_timeout = _FOREVER if attributes.lasting and not attributes.control else 0
    entry.attr_timeout = _FOREVER if attributes.lasting else 0
    return entry
