"""The master's engine sessions on this node: each is one worker, whose packets pass through unread.

Descriptors cannot travel to the master: where an answer brings some, the slave holds them and sends handles; where
a request wants some, the master names handles.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from errno import EBADF, EEXIST, ENOENT

from bpfs.engines import WorkerChannel, Workers
from bpfs.errors import BpfsError
from bpfs.fdinfo import inode_and_offset
from bpfs.slave.births import BirthWatch
from bpfs.slave.keeper import Keeper
from bpfs.wire.messages import EngineCall, EngineClose, EngineOpen, EngineReply, FdClose, FdIsWhere, FdWhere


class HeldFds:
    """Descriptors that the slave holds for the master, by handle. Handles are never used twice."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._fds = {handle: kept.fds[0] for handle, kept in keeper.of("fd")}
        self._kept = set(self._fds)
        self._next = itertools.count((keeper.life << 32) + 1)

    def hold(self, fd: int, lasting: bool = True) -> int:
        """Keep a descriptor; gives its handle.

        Args:
            lasting: it is a job's, and the next life shall hold it; else it is of use in a move only.
        """
        handle = next(self._next)
        self._fds[handle] = fd
        if lasting:
            self._keeper.keep(("fd", handle), None, [fd])
            self._kept.add(handle)
        return handle

    def _drop(self, handle: int) -> int:
        if handle in self._kept:
            self._kept.remove(handle)
            self._keeper.drop(("fd", handle))
        return self._fds.pop(handle, -1)

    def take(self, handle: int) -> int:
        """Give a descriptor out: it is the caller's.

        Raises:
            BpfsError: EBADF.
        """
        fd = self._drop(handle)
        if fd < 0:
            raise BpfsError(EBADF, f"the node holds no descriptor {handle}")
        return fd

    def close(self, message: FdClose | None = None) -> None:
        """Handler, and the end: close these, or all."""
        for handle in message.fds if message is not None else list(self._fds):
            fd = self._drop(handle)
            if fd >= 0:
                os.close(fd)

    def where(self, message: FdWhere) -> FdIsWhere:
        """Handler: offsets of files that a job had; the descriptors are closed."""
        offsets, inodes = [], []
        for handle in message.fds:
            fd = self.take(handle)
            try:
                # Never fstat: the file may be one of our own tree.
                inode, offset = inode_and_offset(fd)
            except OSError:
                inode, offset = 0, -1
            os.close(fd)
            inodes.append(inode)
            offsets.append(offset)
        return FdIsWhere(tuple(offsets), tuple(inodes))

    def __iter__(self) -> Iterator[int]:
        return iter(tuple(self._fds))

    def __len__(self) -> int:
        return len(self._fds)


class EngineHost:
    """The open engine sessions."""

    def __init__(self, workers: Workers, held: HeldFds) -> None:
        self._workers = workers
        self._held = held
        self.births: BirthWatch | None = None
        self.before: Callable[[], None] | None = None  # done before anything that a session does
        self._sessions: dict[int, WorkerChannel] = {}
        self._began: dict[int, float] = {}  # seconds of CLOCK_BOOTTIME
        self._failed: dict[int, BpfsError] = {}  # sessions without a worker: the master has not waited to hear it

    def open(self, message: EngineOpen) -> None:
        """Handler: give a session its worker."""
        if message.session in self._sessions:
            raise BpfsError(EEXIST, f"engine session {message.session} is open already")
        self.expect_jobs()
        if self.before is not None:
            self.before()
        self._began[message.session] = time.clock_gettime(time.CLOCK_BOOTTIME)
        try:
            self._sessions[message.session] = WorkerChannel(self._workers.open_socket())
        except BpfsError as error:
            self._failed[message.session] = error
            raise

    async def call(self, message: EngineCall) -> EngineReply:
        """Handler: one request to the session's worker. Cancelling it aborts the session."""
        channel = self._sessions.get(message.session)
        if channel is None:
            failed = self._failed.get(message.session)
            raise failed or BpfsError(ENOENT, f"there is no engine session {message.session}")
        fds: list[int] = []
        try:
            for handle in message.fds:
                fds.append(self._held.take(handle))
            body, received = await channel.exchange(message.body, fds)
        finally:
            for fd in fds:
                os.close(fd)
        return EngineReply(body, tuple(self._held.hold(fd) for fd in received))

    def close(self, message: EngineClose) -> None:
        """Handler: end a session; its worker undoes what was not finished."""
        self._failed.pop(message.session, None)
        self._began.pop(message.session, None)
        channel = self._sessions.pop(message.session, None)
        if channel is not None:
            channel.close()
            self.expect_jobs()

    def expect_jobs(self) -> None:
        """Jobs come, or go."""
        if self.births is not None:
            self.births.look()

    @property
    def oldest(self) -> float | None:
        """When the oldest of the open sessions began, in seconds of CLOCK_BOOTTIME; None: none is open."""
        return min(self._began.values(), default=None)

    def close_all(self) -> None:
        """End all sessions: the link is gone."""
        for channel in self._sessions.values():
            with suppress(OSError):
                channel.close()
        self._sessions.clear()
        self._failed.clear()
        self._began.clear()

    def __len__(self) -> int:
        return len(self._sessions)
