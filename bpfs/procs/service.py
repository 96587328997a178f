"""What the cluster does with processes: the one object behind /bpfs/procs and nodes/N/migrate."""

from __future__ import annotations

import errno
import signal
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable

import trio

from bpfs import log
from bpfs.engines import Workers
from bpfs.errors import BpfsError, errno_name
from bpfs.nodes.registry import MASTER, NodeTable
from bpfs.procs import mapped, usage
from bpfs.procs.batch import Batches
from bpfs.procs.checkpoint import Checkpoints
from bpfs.procs.exits import listening
from bpfs.procs.lazy import Lazy
from bpfs.procs.losses import Losses
from bpfs.procs.migration import Migration
from bpfs.procs.onexec import OnExec
from bpfs.procs.places import MasterPlace, NodePlace, Place
from bpfs.procs.process import ExitStatus, Move, Process, ProcState, move_log
from bpfs.procs.psview import PsView
from bpfs.procs.restart import Restarts
from bpfs.procs.rights import admits, bound, may_control, writes_itself
from bpfs.procs.routes import route
from bpfs.procs.surroundings import Surroundings
from bpfs.procs.table import ProcTable, read_identity
from bpfs.procs.tree import Trees
from bpfs.procs.verbs import MoveVerb
from bpfs.tree.base import Caller, WriteRequest

_log = log.get("procs")


class Procs:
    """The processes of the cluster."""

    def __init__(self, nodes: NodeTable, around: Surroundings, workers: Workers) -> None:
        self.nodes = nodes
        self.ghosts = around.ghosts
        self.table: ProcTable = around.ghosts.table
        self._around = around
        self._master = MasterPlace(workers)
        self._onexec = OnExec(self, around)
        self._trees = Trees(self, around)
        self._moves: dict[int, deque[Move]] = defaultdict(move_log)
        self._under_way: set[Migration] = set()
        self.checkpoints = Checkpoints(self, around, self._master)
        self.restarts = Restarts(self, around, self._master)
        self.batches = Batches(self, around, self._master)
        self.losses = Losses(self)
        around.ghosts.rescue = self.losses.rescue
        self.view: PsView | None = None

    def take_up(self) -> None:
        """Goes on with what users have asked an earlier master for."""
        self.losses.take_up()
        self.checkpoints.take_up()

    # -- moving ------------------------------------------------------------------------------------------------

    async def migrate(self, verb: MoveVerb, node: int, request: WriteRequest) -> None:
        """Carries out a write to nodes/`node`/migrate. Raises BpfsError as `move`."""
        if verb.onexec:
            await self._onexec.arm(verb.pid, node, request, verb.strict)
        elif verb.tree:
            await self._trees.move(verb.pid, node, request, verb.close)
        else:
            await self.move(verb, node, request)

    async def move(self, verb: MoveVerb, node: int, request: WriteRequest) -> None:
        """Moves a process; returns when it runs there.

        Raises:
            BpfsError: ESRCH no such process; ENOENT no such node; EHOSTDOWN it is down; EACCES the caller may not;
                EBUSY it is moving already; EOPNOTSUPP it cannot be moved; ETIMEDOUT.
        """
        proc = await self.admit(verb.pid, node, request.caller)
        if proc.place == node:
            return
        migration = route(proc, self.place(proc.place), self.place(node), self._around)
        migration.precopy = self._around.precopy
        migration.wants_strict |= verb.strict
        if verb.lazy:
            migration.be_lazy(self._look_after)
        if verb.close:
            migration.looking["close"] = True
        writer = request if writes_itself(request.caller, proc) else None
        await self.carry_out(migration, lambda: migration.run(writer))

    def choose_strict(self, nodes: tuple[range, ...]) -> None:
        """From now on, whoever comes to these nodes is a strict job there."""
        self._around.strict_nodes = nodes

    def _look_after(self, lazy: Lazy) -> None:
        self.ghosts.nursery.start_soon(lazy.run, self.table, name="memory to come")

    def cancel(self, proc: Process, caller: Caller) -> None:
        """Calls off the move of a process, which stays where it is; the write that asked for the move fails.

        Raises:
            BpfsError: EACCES the caller may not; ESRCH it is not moving; EBUSY it is too late.
        """
        may_control(caller, proc)
        migration = next((one for one in self._under_way if one.proc is proc), None)
        if migration is None:
            raise BpfsError(errno.ESRCH, f"process {proc.pid} is not moving")
        if not migration.cancel():
            raise BpfsError(errno.EBUSY, f"process {proc.pid} is arriving: it is too late to cancel that")

    async def admit(self, pid: int, node: int, caller: Caller) -> Process:
        """The process, when the caller may move it to that node now. Raises BpfsError as `move`."""
        proc = self.table.find(pid)
        may_control(caller, proc)
        target = self.nodes.get(node)
        await self.ghosts.wait_born(proc)
        if proc.state is ProcState.MIGRATING and caller.pid == pid:
            await proc.settled.wait()  # it writes, so it runs: what is left of its last move is our own business
        if proc.state is ProcState.MIGRATING:
            raise BpfsError(errno.EBUSY, f"process {pid} is moving already: {proc.progress}")
        if proc.owed is not None and proc.place != node:
            await proc.owed.wait_whole()
        if proc.busy:
            raise BpfsError(errno.EBUSY, f"process {pid} is busy: {proc.busy}")
        if proc.place != node:
            admits(target, caller, proc)
        return proc

    async def carry_out(self, migration: Migration, run: Callable[[], Awaitable[None]]) -> None:
        """Runs a migration, and keeps table, log and events right whatever comes of it. Raises BpfsError."""
        proc, node = migration.proc, migration.destination.number
        migration.before = proc.state
        proc.state, proc.settled, proc.source_lost = ProcState.MIGRATING, trio.Event(), False
        self.table.add(proc)
        figures = migration.figures

        def record(outcome: str, reason: str) -> None:
            move = Move(proc.pid, outcome, reason, figures.freeze_ms, figures.total_ms, figures.bytes)
            self._moves[node].append(move)

        self._under_way.add(migration)
        homing = self.view if node == MASTER else None
        # Before the process runs on: it may be a script that reads at once what was wrong.
        migration.on_failure = lambda error: record(errno_name(error.code), error.sentence)
        try:
            if why := bound(proc):
                raise BpfsError(errno.EOPNOTSUPP, why)
            if homing is not None:
                await homing.before_home(proc)
            await run()
            proc.arrived(node, figures.freeze_ms, figures.bytes)
            # Its parent, which is there, alone hears of its end.
            proc.native = node != MASTER and proc.identity.ppid in migration.along
            record("ok", "")
        except BpfsError as error:
            migration.fail(error)
            raise
        finally:
            if proc.state is ProcState.MIGRATING:
                proc.state = migration.before
            with trio.CancelScope(shield=True):
                await self._settle(proc, migration.source.number)
            self._under_way.discard(migration)
            if homing is not None:
                homing.home(proc)
            proc.landing = proc.pledged = False
            proc.settled.set()

    def refused(self, pid: int, node: int, error: BpfsError) -> None:
        """A move that did not even begin has a line in nodes/`node`/migrate as well."""
        self._moves[node].append(Move(pid, errno_name(error.code), error.sentence, 0.0, 0.0, 0))

    async def _settle(self, proc: Process, source: int) -> None:
        # The migration no longer owns it: what happened to it meanwhile counts now.
        if proc.source_lost and proc.place == source:
            proc.doom = ExitStatus(signal=signal.SIGKILL)
        if proc.doom is not None:
            await self.ghosts.end(proc, proc.doom)
        elif not proc.away and len(proc.history) == 1:
            self.table.forget(proc)  # it never left
        else:
            self.table.changed(proc, f"node {proc.place}")
        away = self.ghosts.stand_in(proc.pid)
        if away is not None:
            away.bound = None
            self.ghosts.note(away)

    def place(self, number: int) -> Place:
        """The place behind a node's number.

        Raises:
            BpfsError: ENOENT, EHOSTDOWN.
        """
        if number == MASTER:
            return self._master
        return NodePlace(self.nodes.get(number))

    async def moves_to(self, node: int) -> list[Move]:
        """The last moves to a node, oldest first."""
        for migration in [one for one in self._under_way if one.destination.number == node]:
            await migration.proc.wait_landed()
        return list(self._moves[node])

    # -- everything else ---------------------------------------------------------------------------------------

    async def signal(self, proc: Process, signo: int, caller: Caller) -> None:
        """Sends a signal, wherever the process is.

        Raises:
            BpfsError: EPERM, ESRCH, EHOSTDOWN.
        """
        may_control(caller, proc, errno.EPERM)
        await self.ghosts.signals.signal(proc, signo, caller)

    async def wait(self, proc: Process) -> ExitStatus:
        """Blocks until the process has ended, wherever it is by then.

        Its pid on the master tells, at home and away: a ghost ends with the very status of its process.

        Raises:
            BpfsError: ESRCH, it ended before anybody listened; EOPNOTSUPP, the kernel does not tell of ends.
        """
        if proc.status is not None:
            return proc.status
        stand_in = self.ghosts.stand_in(proc.pid)
        if stand_in is not None and not stand_in.real:
            return await proc.wait_ended()
        try:
            with listening() as exit_of:
                read_identity(proc.pid)
                status = await exit_of(proc.pid)
        except BpfsError:
            raise
        except OSError as error:
            raise BpfsError(errno.EOPNOTSUPP, f"cannot wait for {proc.pid}: {error.strerror}") from error
        if not proc.away:
            self.table.end(proc, status)
        return proc.status or status

    async def obstacles(self, proc: Process) -> list[str]:
        """Why the process cannot move now, in words; it is stopped for a moment to look."""
        if why := _cannot(proc):
            return [why]
        place = self.place(proc.place)
        async with place.engine() as engine:
            try:
                hostpid = await place.hostpid(proc)
                reply = await engine.call(
                    "obstacles", pid=hostpid, family=True, at_home=not proc.away, contents=self._around.contents
                )
            except BpfsError as error:
                return [error.sentence]
        return list(reply["refusals"])

    async def tree_obstacles(self, proc: Process) -> list[str]:
        """Why it cannot move with all that descend from it; they are stopped for a moment to look."""
        why = _cannot(proc)
        return [why] if why else await self._trees.obstacles(proc)

    async def rusage(self, proc: Process) -> str:
        """`key value` lines about what the process used. Raises BpfsError."""
        return usage.render(await self.ghosts.status_files(proc, ("stat", "status")))

    async def mapped(self, proc: Process) -> str:
        """A line a file that the process maps: whose it is where it runs, and its name. Raises BpfsError."""
        return mapped.render(await self.ghosts.status_files(proc, ("maps", "mountinfo")))


def _cannot(proc: Process) -> str:
    """What the master knows to be in the way of a process, in words; empty: nothing."""
    if proc.copying or proc.state is ProcState.MIGRATING:
        return "it is moving already"
    if proc.owed is not None:
        return f"its memory is not all there: {proc.owed.progress}"
    return bound(proc)
