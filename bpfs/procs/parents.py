"""When a parent ends, its children become init's, wherever they are: the placeholder of a dead process is dropped.

Every process of the cluster has its pid on the master, as itself or as a ghost; so a pidfd there tells of its end.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from bpfs.errors import BpfsError
from bpfs.procs.process import Process, ProcState
from bpfs.wire import messages

if TYPE_CHECKING:
    from bpfs.procs.ghosts import Ghosts

INIT = 1
SETTLE = 0.05  # seconds between looks whether a child's move is over
GO_ON = 1.0  # seconds from SIGCONT for a ghost to the report that its process goes on
DROP_TIMEOUT = 10.0  # seconds for a node to answer


class Parents:
    """The parents of processes that are away."""

    def __init__(self, ghosts: Ghosts) -> None:
        self._ghosts = ghosts
        self._watched: set[int] = set()
        self._children: dict[int, set[int]] = {}  # parent -> all processes that are away
        self._parent: dict[int, int] = {}

    def know(self, proc: Process) -> None:
        """It is away, or has another parent now."""
        pid, parent = proc.pid, proc.identity.ppid
        if self._parent.get(pid) != parent:
            self.forget(pid)
            self._parent[pid] = parent
            self._children.setdefault(parent, set()).add(pid)

    def forget(self, pid: int) -> None:
        """It is away no more."""
        parent = self._parent.pop(pid, None)
        if parent is not None:
            self._children[parent].discard(pid)
            if not self._children[parent]:
                del self._children[parent]

    def watch(self, proc: Process) -> None:
        """Look out for the end of its parent from now on."""
        parent = proc.identity.ppid
        if parent > INIT and parent not in self._watched:
            self._watched.add(parent)
            self._ghosts.nursery.start_soon(self._wait, parent, name=f"end of parent {parent}")

    async def _wait(self, parent: int) -> None:
        try:
            try:
                process = os.pidfd_open(parent)
            except ProcessLookupError:
                pass  # ended already
            else:
                try:
                    await trio.lowlevel.wait_readable(process)
                finally:
                    os.close(process)
        finally:
            self._watched.discard(parent)
        for pid in list(self._children.get(parent, ())):
            proc = self._ghosts.table.known(pid)
            if proc is not None and proc.away and proc.identity.ppid == parent:
                self._ghosts.nursery.start_soon(self._orphan, proc, parent, name=f"orphan {proc.pid}")

    async def _hung_up(self, proc: Process) -> None:
        """The kernel here has sent SIGHUP and SIGCONT to the ghosts of a stopped group that is orphaned now: its
        processes are to have them before the node's own kernel finds the same, or they would get them twice."""
        away = self._ghosts.stand_in(proc.pid)
        with trio.move_on_after(GO_ON):
            while away is not None and proc.state is ProcState.STOPPED and away.ghost.state() not in "TtX":
                await trio.sleep(SETTLE / 10)

    async def _orphan(self, proc: Process, parent: int) -> None:
        while proc.state is ProcState.MIGRATING:
            await trio.sleep(SETTLE)
        proc.identity = replace(proc.identity, ppid=INIT)
        if (away := self._ghosts.stand_in(proc.pid)) is not None:
            self._ghosts.note(away)
        await self._hung_up(proc)
        if proc.native or not proc.away or proc.status is not None:
            return
        session = self._ghosts.nodes.get(proc.place).session
        try:
            if session is not None:
                await session.link.request(messages.DropPlaceholder(parent), DROP_TIMEOUT)
        except BpfsError:
            return  # the node is gone, and they with it
