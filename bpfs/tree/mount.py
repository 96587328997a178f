# SPDX-License-Identifier: GPL-2.0-or-later
"""The mount of a tree: session, loop, end. One a process, since pyfuse3 has one global session.

The session loop of pyfuse3 waits until the FUSE descriptor is readable and then reads it, blocking and with the GIL
held. When the request has vanished in between (its caller was interrupted or killed) that read would freeze the whole
daemon until the next request comes. So the descriptor is made non-blocking, and the loop is entered again on EAGAIN. A
second look right before the read makes that rare, for each time costs a buffer that pyfuse3 does not free.

The same look is what makes the tree quick: who reads a file sends the next request within microseconds of the last
answer, so looking out for it a moment is cheaper than going to sleep (a read of a status file: 85 us instead of 315 us
on the machine where it was measured).
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from errno import EAGAIN, EBUSY, ECONNABORTED, EINVAL, ENOTCONN
from typing import Any, NoReturn

import pyfuse3
import trio

from bpfs import kernel
from bpfs.errors import BpfsError
from bpfs.tree.base import MASTER, Tree
from bpfs.tree.callers import process_of
from bpfs.tree.fuse import Operations
from bpfs.tree.notify import Notifier

log = logging.getLogger(__name__)

_MAX_TASKS = 1_000_000
"""One task a waiting caller; a limit would let blocked readers lock out everybody else."""

_OPTIONS = {"fsname=bpfs", "subtype=bpfs", "allow_other", "default_permissions", "nosuid", "nodev", "noexec"}

_MNT_FORCE = 1  # sys/mount.h; aborts the connection of a FUSE mount even when it is busy

_SPIN_S = 30e-6
"""Seconds to look for the next request before going to sleep: longer than a caller's way between two requests."""

_ALL_DESCRIPTORS = 1 << 20

_IN_A_ROW = 32
"""Requests served without a chance for other tasks: some 2 ms at most, far below what a heartbeat would notice."""

_mounted = False


class FuseMount:
    """A mounted tree. Made by `mount`."""

    def __init__(self, mountpoint: str, operations: Operations, notifier: Notifier) -> None:
        self.mountpoint = mountpoint
        self._operations = operations
        self._notifier = notifier

    def interrupt(self, pid: int) -> None:
        """Ends the waits of a process (pid as this daemon sees it) in blocking files with EINTR."""
        self._operations.watch.interrupt(pid)

    async def flush(self) -> None:
        """Waits until the kernel knows of all changes."""
        await self._notifier.flush()

    def statistics(self) -> dict[str, int]:
        """Numbers for tests and for people: known inodes, open files, vanished requests."""
        return self._operations.statistics()


@asynccontextmanager
async def mount(
    tree: Tree, mountpoint: str, *, node: int = MASTER, identify: Callable[[int], int] = process_of
) -> AsyncIterator[FuseMount]:
    """Mounts `tree` and serves it; unmounts at the end, whoever still uses it.

    Args:
        tree: what to show.
        mountpoint: an existing directory. A dead mount of an earlier daemon there is removed first.
        node: the node number of this machine, for `Caller.node`.
        identify: gives the cluster's pid of a thread (a tid as this process sees it), 0 where it has none.

    Raises:
        BpfsError: with the reason in words, when the mount cannot be made.
    """
    global _mounted
    if _mounted:
        raise BpfsError(EBUSY, "a process can have one mount only")
    clear_dead_mount(mountpoint)
    notifier = Notifier()
    operations = Operations(tree, notifier, node, identify)
    descriptor = _init(operations, mountpoint)
    _mounted = True
    _mend_session_loop(descriptor, operations)
    try:
        async with trio.open_nursery() as nursery:
            notifier.start()
            nursery.start_soon(operations.watch.run, name="signals of waiting callers")
            nursery.start_soon(_serve, nursery, name="fuse")
            nursery.start_soon(_end_flushes, mountpoint, name="first flush")
            try:
                yield FuseMount(mountpoint, operations, notifier)
            finally:
                nursery.cancel_scope.cancel()
    finally:
        notifier.close()
        # First abort the connection: nobody waits for us any more, not even our own notifier. That may be all where
        # somebody's working directory is there, and libfuse leaves what it finds aborted.
        if not _umount(mountpoint, _MNT_FORCE):
            _umount(mountpoint, kernel.MNT_DETACH)
        pyfuse3.close(unmount=True)
        _mounted = False


async def _end_flushes(mountpoint: str) -> None:
    """Has the kernel learn that close(2) needs no FLUSH, which it asks for until it has once been told ENOSYS.

    Until then a daemon that closed a descriptor of a job that happens to be a file of this very tree would wait for
    itself. So one file is opened and closed right away; by a child, for a thread that waits for its own process would
    hold that process, dead already, and its mount for ever. The child first lets go of the mount's descriptor.
    """
    child = os.fork()
    if child == 0:
        os.closerange(0, _ALL_DESCRIPTORS)
        _open_and_close(mountpoint)
    pidfd = os.pidfd_open(child)
    try:
        await trio.lowlevel.wait_readable(pidfd)
        await trio.to_thread.run_sync(os.waitpid, child, 0)  # it has ended
    except trio.Cancelled:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(pidfd)


def _open_and_close(mountpoint: str) -> NoReturn:
    try:
        with os.scandir(mountpoint) as entries:
            name = next(entry.path for entry in entries if entry.is_file(follow_symlinks=False))
        os.close(os.open(name, os.O_RDONLY | os.O_NONBLOCK))
    finally:  # no file, no flush; or the link is down, and then the first closer of a file will do
        os._exit(0)


async def _serve(nursery: trio.Nursery) -> None:
    await pyfuse3.main(min_tasks=1, max_tasks=_MAX_TASKS)
    # The loop ends by itself when somebody unmounts.
    log.warning("the tree was unmounted from outside")
    raise BpfsError(ENOTCONN, "the tree was unmounted from outside")


def _init(operations: Operations, mountpoint: str) -> int:
    """Mounts; returns the descriptor of the session."""
    if not os.path.isdir(mountpoint):
        raise BpfsError(EINVAL, f"{mountpoint} is no directory")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise BpfsError(EINVAL, "/dev/fuse cannot be opened: is the fuse module loaded, and are you root?")
    before = _fuse_descriptors()
    try:
        pyfuse3.init(operations, mountpoint, _OPTIONS)
    except RuntimeError as error:
        raise BpfsError(EINVAL, f"cannot mount on {mountpoint}: {error}") from None
    (descriptor,) = _fuse_descriptors() - before
    os.set_blocking(descriptor, False)
    return descriptor


def _fuse_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.add(int(name))
        except OSError:
            pass  # the descriptor of the listing itself
    return found


# Not in the type stubs, being inner parts; .pyx functions find each other by these names in the module.
_inner: Any = pyfuse3
_original_loop = _inner._session_loop
_original_wait = _inner._wait_fuse_readable


def _mend_session_loop(descriptor: int, operations: Operations) -> None:
    """See the module's head."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)

    async def session_loop(*args: Any) -> None:
        while True:
            try:
                await _original_loop(*args)
                return
            except OSError as error:
                if error.errno != EAGAIN:
                    raise
                operations.vanished += 1

    served = 0

    async def wait_fuse_readable() -> bool:
        nonlocal served
        if served < _IN_A_ROW and not operations.busy and _ready_soon(poll):
            served += 1
            return True
        served = 0
        while await _original_wait():
            if poll.poll(0):
                return True
        return False

    _inner._session_loop = session_loop
    _inner._wait_fuse_readable = wait_fuse_readable


def _ready_soon(poll: select.poll) -> bool:
    end = time.perf_counter() + _SPIN_S
    while not poll.poll(0):
        if time.perf_counter() > end:
            return False
        # The caller may be waiting for this very processor.
        os.sched_yield()
    return True


# -- unmounting --------------------------------------------------------------------------------------------------------


def clear_dead_mount(mountpoint: str) -> None:
    """Removes mounts whose daemon is dead (killed) from a directory."""
    for _ in range(16):  # they may lie on top of each other
        try:
            os.statvfs(mountpoint)  # not stat, which the kernel may answer by itself from what it remembers
            return
        except OSError as error:
            if error.errno not in (ENOTCONN, ECONNABORTED):
                return
        if not _umount(mountpoint, kernel.MNT_DETACH):
            return


def _umount(mountpoint: str, flags: int) -> bool:
    try:
        kernel.umount(mountpoint, flags)
    except OSError:
        return False
    return True
