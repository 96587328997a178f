"""Has a job of an order (engine/execorder.py) born under its placeholders, in one go (csrc/bear.h).

What cannot be done so, or fails, leaves nothing but placeholders; whoever asked for it may build the process from its
image then.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import select
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from engine.linux import nsfs, process_vm
from engine.linux.packets import MAX_PACKET
from engine.placeholders import INIT, Birth, Command, Step, World, carry_out, clear_way, command, outer_pid, plan

# csrc/nodeinit.h
_ORDERS_FD: Final = 60
_MAGIC: Final = 0x31424642
_LINKS: Final = 3
_ASIDE: Final = 1
_HEAD: Final = struct.Struct("=IiIiII")
_LINK: Final = struct.Struct("=iI")
_FAILURE: Final = struct.Struct("=ii")
_NO_CHILD: Final = -2  # csrc/bear.h
_NO_ANSWER: Final = _FAILURE.pack(errno.ETIMEDOUT, -1)


class Bearer:
    """The way of orders to one job namespace."""

    def __init__(self, init: int) -> None:
        """Args:
            init: pid of nodeinit as the caller sees it, which is ready.

        Raises:
            OSError: nodeinit has ended, or has no socket for orders.
        """
        self.init = init
        handle = process_vm.pidfd_open(init)
        try:
            self._socket = socket.socket(fileno=process_vm.pidfd_getfd(handle, _ORDERS_FD + 1))
        finally:
            os.close(handle)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_PACKET)
        self._socket.setblocking(False)

    def begin(self, ids: tuple[int, int, int, int], uid: int, table: bytes, fds: list[int]) -> Bearing:
        """Order a birth.

        Args:
            ids: pid, parent, group and session of the job (cluster pids).
            uid: its real uid.
            table: of the order.
            fds: what it is to have; they stay the caller's.

        Raises:
            BlockingIOError: another birth is under way: try again.
            OSError: it cannot be.
        """
        namespace = nsfs.open_pid_namespace(self.init)
        try:
            fcntl.flock(namespace, fcntl.LOCK_EX | fcntl.LOCK_NB)
            clear_way(self.init, namespace, set(ids))
            maker, head = self._prepare(namespace, ids, uid)
            status, theirs = os.pipe2(os.O_CLOEXEC)
            try:
                passed = array.array("i", [theirs, *fds])
                self._socket.sendmsg([head, table], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
                command(self.init, maker, Command.BEAR)
            except BaseException:
                os.close(status)
                raise
            finally:
                os.close(theirs)
        except BaseException:
            os.close(namespace)
            raise
        return Bearing(self.init, ids[0], namespace, status)

    def _prepare(self, namespace: int, ids: tuple[int, int, int, int], uid: int) -> tuple[int, bytes]:
        world = World(self.init)
        try:
            steps, birth = plan(world, *ids)
            first = steps[0].maker if steps else birth.maker
            known = world.get(birth.maker)
            if known is None or not (known.placeholder or birth.maker == INIT):
                raise OSError(errno.EOPNOTSUPP, "its parent here is no placeholder")
        finally:
            world.close()
        before: list[Step] = []
        while (links := _links(steps, birth)) is None:
            before.append(steps.pop(0))
            first = steps[0].maker if steps else birth.maker
        carry_out(self.init, namespace, before, uid)
        maker = outer_pid(self.init, namespace, first)
        if maker is None:
            raise ProcessLookupError(errno.ESRCH, f"process {first} is gone from this node")
        how = Command.SIBLING * birth.sibling | Command.SETSID * birth.setsid
        head = _HEAD.pack(_MAGIC, ids[0], how, birth.pgid or 0, uid, len(links))
        return maker, head + b"".join(_LINK.pack(*link) for link in links).ljust(_LINK.size * _LINKS, b"\0")

    def close(self) -> None:
        """Give the descriptor back."""
        self._socket.close()


def _links(steps: list[Step], birth: Birth) -> list[tuple[int, int]] | None:
    """Placeholders that make each other and the job in this order; None: they cannot."""
    links = []
    for index, step in enumerate(steps):
        after = steps[index + 1].maker if index + 1 < len(steps) else birth.maker
        aside = after == step.maker
        if step.pid == step.maker or not (aside or after == step.pid) or (aside and step.command & Command.SIBLING):
            return None
        links.append((step.pid, int(step.command) | _ASIDE * aside))
    return links if len(links) <= _LINKS else None


class Bearing:
    """A birth that is under way. It holds the namespace's lock until `settle`.

    Attributes:
        status: readable when it is known how it went.
    """

    __slots__ = ("_init", "_namespace", "_pid", "status")

    def __init__(self, init: int, pid: int, namespace: int, status: int) -> None:
        self._init, self._pid, self._namespace, self.status = init, pid, namespace, status

    def settle(self, doomed: Callable[[int], None]) -> int:
        """See how it went, and give the lock back.

        Args:
            doomed: called with the job's pid before what has come of it is killed.

        Returns:
            The job's host pid; 0 where it has ended by now.

        Raises:
            OSError: there is no job.
        """
        try:
            told = os.read(self.status, _FAILURE.size) if select.select([self.status], [], [], 0)[0] else _NO_ANSWER
            if not told:
                return outer_pid(self._init, self._namespace, self._pid) or 0
            code, row = _FAILURE.unpack(told)
            if row != _NO_CHILD:
                self._kill(doomed)
            raise OSError(code, f"call {row} of its birth: {os.strerror(code)}")
        finally:
            os.close(self.status)
            os.close(self._namespace)

    def _kill(self, doomed: Callable[[int], None]) -> None:
        outer = outer_pid(self._init, self._namespace, self._pid)
        if outer is not None:
            doomed(self._pid)
            with suppress(ProcessLookupError):
                os.kill(outer, signal.SIGKILL)
