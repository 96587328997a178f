"""`PID onexec`: the process runs on until it execs, and its new program runs on the node only.

That is BProc's execmove, and what bpsh is made of. The program is looked up on the master; at the exec the process is
smallest, and nothing of the old program has to move.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.procs.away import carefully
from bpfs.procs.leave import Leave
from bpfs.procs.migration import UNDO_TIMEOUT, Externals, Migration, Release
from bpfs.procs.ordered import AtExec
from bpfs.procs.phases import is_watched_closely
from bpfs.procs.places import Engine
from bpfs.procs.process import MASTER, Process
from bpfs.procs.rights import bound
from bpfs.procs.routes import route
from bpfs.procs.surroundings import Surroundings
from bpfs.procs.table import read_identity
from bpfs.procs.terminal import in_foreground, on_terminal
from bpfs.tree.base import WriteRequest

if TYPE_CHECKING:
    from bpfs.procs.service import Procs

READY_FOR = 2.0  # seconds for which a node keeps ready what an armed process will need
EXIT_CANNOT_MOVE = 125  # what env(1), timeout(1) and others end with when they fail themselves

_log = log.get("procs")


class OnExec:
    """The processes that are armed for their next exec."""

    def __init__(self, procs: Procs, around: Surroundings) -> None:
        self._procs = procs
        self._nursery = around.ghosts.nursery
        self._around = around
        self._armed: dict[int, trio.CancelScope] = {}

    async def arm(self, pid: int, node: int, request: WriteRequest, strict: bool = False) -> None:
        """Arms a process of the master; a second write replaces the first. Returns at once. `strict`: as for a move.

        Raises:
            BpfsError: as for a move; EOPNOTSUPP for a process that is away, has several threads, or can never move.
        """
        proc = await self._procs.admit(pid, node, request.caller)
        if why := bound(proc):
            raise BpfsError(errno.EOPNOTSUPP, why)
        if proc.away:
            raise BpfsError(errno.EOPNOTSUPP, f"process {pid} is on node {proc.place}: onexec works on the master")
        self.disarm(pid)
        if node == MASTER:
            return
        await self._nursery.start(self._follow, proc, node, strict, name=f"onexec of {pid}")

    def disarm(self, pid: int) -> None:
        """Forgets what was armed for a process."""
        scope = self._armed.pop(pid, None)
        if scope is not None:
            scope.cancel()

    async def _follow(
        self, proc: Process, node: int, strict: bool, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        refused: BpfsError | None = None  # raised outside of the nursery, which would wrap it
        with trio.CancelScope() as scope:
            ahead = Ahead(self._route(proc, node, strict))
            async with self._procs.place(MASTER).engine() as engine, trio.open_nursery() as nursery:
                if not ahead.orders:
                    nursery.start_soon(carefully, proc.pid, ahead.run())
                try:
                    told = await engine.call("arm", pid=proc.pid, order=ahead.orders, **ahead.migration.looking)
                except BpfsError as error:
                    nursery.cancel_scope.cancel()
                    refused = error
                else:
                    ahead.tell(told)
                    self._armed[proc.pid] = scope
                    task_status.started()
                    await carefully(proc.pid, self._wait_and_move(proc, node, engine, scope, ahead))
                    nursery.cancel_scope.cancel()
        if refused is not None:
            raise refused

    def _route(self, proc: Process, node: int, strict: bool) -> Migration:
        migration = route(proc, self._procs.place(MASTER), self._procs.place(node), self._around)
        migration.wants_strict |= strict
        return migration

    async def _wait_and_move(
        self, proc: Process, node: int, engine: Engine, scope: trio.CancelScope, ahead: Ahead
    ) -> None:
        try:
            told = await engine.call("wait_exec", order=ahead.orders, **ahead.migration.looking)
        except BpfsError as error:
            _log.info("process %d ended before it ran another program: %s", proc.pid, error)
            return
        finally:
            if self._armed.get(proc.pid) is scope:
                del self._armed[proc.pid]
        await self._move(proc, node, engine, ahead, told)

    async def _move(self, proc: Process, node: int, engine: Engine, ahead: Ahead, told: dict[str, Any]) -> None:
        async def end(error: BpfsError) -> None:
            text = f"bpfs: process {proc.pid} cannot run on node {node}: {error}\n"
            await engine.call("end", code=EXIT_CANNOT_MOVE, message=text.encode())

        try:
            proc.identity = read_identity(proc.pid)
            if "order" in told and await self._order(ahead.migration, engine, told, end):
                return
            ready = await ahead.take()
            migration = ahead.migration if ready is not None else self._route(proc, node, ahead.migration.wants_strict)
        except BpfsError as error:
            await end(error)
            return
        try:
            await self._procs.carry_out(migration, lambda: migration.run_stopped(engine, end, ready))
        except BpfsError as error:
            _log.info("process %d did not get to node %d: %s", proc.pid, node, error)

    async def _order(self, migration: Migration, engine: Engine, told: dict[str, Any], end: Release) -> bool:
        """Returns whether that was the last word on it; else it has to go the way of all moves."""
        assert isinstance(migration, Leave)
        paths = [os.fsdecode(path) for path in told["files"]]
        bare = (migration.looking.get("unlike") or {}).get("bare")
        if told["process"]["children"] or (bare and not all(map(self._around.exports.holds, paths))):
            await engine.call("stay")
            return False
        there = AtExec(migration, told, self._around)
        try:
            await self._procs.carry_out(there, lambda: there.start(engine, end))
        except BpfsError as error:
            _log.info("process %d did not get to node %d: %s", there.proc.pid, there.destination.number, error)
        return True


class Ahead:
    """A move that is made ready while its process is still on the way to its exec."""

    def __init__(self, migration: Migration) -> None:
        self.migration = migration
        self.orders = isinstance(migration, Leave) and not migration.strict and not is_watched_closely()
        """Whether the process, at its exec, is most likely nothing that an order could not bring about: then nothing
        else is made ready."""
        if "digests" in migration.looking or on_terminal(migration.proc.pid):
            self.orders = False
        self._birth = _birth(migration.proc)
        self._engine: Engine | None = None
        self._externals: Externals = []
        self._told = trio.Event()
        self._settled = trio.Event()
        self._taken = trio.Event()
        self._over = trio.Event()
        self._scope = trio.CancelScope()

    def tell(self, told: dict[str, Any]) -> None:
        """The process is armed, as its engine told: nothing is ready without its externals."""
        if self.orders:
            self._settled.set()
            self._over.set()
        else:
            self._externals = told["externals"]
            self._told.set()

    async def run(self) -> None:
        """Makes it ready, and holds it so for a while, or, once taken, until it is cancelled.

        Begins beside the arming: the empty process takes longer than that.
        """

        async def look() -> Externals:
            await self._told.wait()
            return self._externals

        try:
            with self._scope:
                async with self.migration.destination.engine() as engine:
                    try:
                        await self.migration.make_ready(engine, look)
                        self._engine = engine
                        self._settled.set()
                        await self._hold()
                    finally:
                        if not self._taken.is_set():
                            await self._undo(engine)
        except BpfsError as error:
            _log.info("process %d: nothing is ready before its exec: %s", self.migration.proc.pid, error)
        finally:
            self._engine = None
            self._settled.set()
            self._over.set()

    async def _hold(self) -> None:
        with trio.move_on_after(READY_FOR):
            await self._taken.wait()
        if self._taken.is_set():
            await trio.sleep_forever()
        self._engine = None

    async def _undo(self, engine: Engine) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + UNDO_TIMEOUT):
            with suppress(BpfsError):
                await engine.call("discard")
            await self.migration.stay()

    async def take(self) -> Engine | None:
        """The destination's engine where all is ready, and the process still is what it was made ready for."""
        await self._settled.wait()
        if self._engine is not None and _birth(self.migration.proc) == self._birth:
            self._taken.set()
            return self._engine
        self._scope.cancel()
        await self._over.wait()  # it had the pid on that node
        return None


def _birth(proc: Process) -> tuple[object, ...]:
    """What decides how and under whom a process is born on a node."""
    who = proc.identity
    return who.uid, who.gid, who.ppid, who.pgid, who.sid, in_foreground(proc.pid), on_terminal(proc.pid)
