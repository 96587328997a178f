"""`PID onexec`: the process runs on until it execs, and its new program runs on the node only.

That is BProc's execmove, and what bpsh is made of. The program is looked up on the master; at the exec the process is
smallest, and nothing of the old program has to move.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.procs.ghosts import carefully
from bpfs.procs.places import Engine
from bpfs.procs.process import MASTER, Process
from bpfs.procs.routes import Surroundings, route
from bpfs.procs.table import read_identity
from bpfs.tree.base import WriteRequest

if TYPE_CHECKING:
    from bpfs.procs.service import Procs

EXIT_CANNOT_MOVE = 125  # what env(1), timeout(1) and others end with when they fail themselves

_log = log.get("procs")


class OnExec:
    """The processes that are armed for their next exec."""

    def __init__(self, procs: Procs, around: Surroundings) -> None:
        self._procs = procs
        self._nursery = around.ghosts.nursery
        self._around = around
        self._armed: dict[int, trio.CancelScope] = {}

    async def arm(self, pid: int, node: int, request: WriteRequest) -> None:
        """Arms a process of the master; a second write replaces the first. Returns at once.

        Raises:
            BpfsError: as for a move; EOPNOTSUPP for a process that is away, or has several threads.
        """
        proc = await self._procs.admit(pid, node, request.caller)
        if proc.away:
            raise BpfsError(errno.EOPNOTSUPP, f"process {pid} is on node {proc.place}: onexec works on the master")
        self.disarm(pid)
        if node == MASTER:
            return
        await self._nursery.start(self._follow, proc, node, name=f"onexec of {pid}")

    def disarm(self, pid: int) -> None:
        """Forgets what was armed for a process."""
        scope = self._armed.pop(pid, None)
        if scope is not None:
            scope.cancel()

    async def _follow(
        self, proc: Process, node: int, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.CancelScope() as scope:
            async with self._procs.place(MASTER).engine() as engine:
                await engine.call("arm", pid=proc.pid)
                self._armed[proc.pid] = scope
                task_status.started()
                await carefully(proc.pid, self._wait_and_move(proc, node, engine, scope))

    async def _wait_and_move(self, proc: Process, node: int, engine: Engine, scope: trio.CancelScope) -> None:
        try:
            await engine.call("wait_exec")
        except BpfsError as error:
            _log.info("process %d ended before it ran another program: %s", proc.pid, error)
            return
        finally:
            if self._armed.get(proc.pid) is scope:
                del self._armed[proc.pid]
        await self._move(proc, node, engine)

    async def _move(self, proc: Process, node: int, engine: Engine) -> None:
        async def end(error: BpfsError) -> None:
            text = f"bpfs: process {proc.pid} cannot run on node {node}: {error}\n"
            await engine.call("end", code=EXIT_CANNOT_MOVE, message=text.encode())

        try:
            proc.identity = read_identity(proc.pid)
            migration = route(proc, self._procs.place(MASTER), self._procs.place(node), self._around)
        except BpfsError as error:
            await end(error)
            return
        try:
            await self._procs.carry_out(migration, lambda: migration.run_stopped(engine, end))
        except BpfsError as error:
            _log.info("process %d did not get to node %d: %s", proc.pid, node, error)
