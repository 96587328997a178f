"""Ghosts and what they stand for, kept in step: signals go out, stops and ends come back."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.nodes.registry import MASTER, Node, NodeTable
from bpfs.procs import ghost as control
from bpfs.procs.away import BORN_WITHIN, Away, carefully, tell
from bpfs.procs.entries import entry_of
from bpfs.procs.families import Families
from bpfs.procs.ghost import Ghost, NoGhost
from bpfs.procs.kernelfiles import ANSWER_S, read_local
from bpfs.procs.ledger import Ledger, Part
from bpfs.procs.process import ExitStatus, Identity, Process, ProcState
from bpfs.procs.reports import Reports
from bpfs.procs.signals import Signals
from bpfs.procs.stdio import Stdio, carry_offsets, reconnect
from bpfs.procs.stops import Stops
from bpfs.procs.table import ProcTable
from bpfs.wire import messages
from bpfs.wire.mux import ghost_table
from bpfs.wire.streams import StreamBook

_log = log.get("procs")


class Ghosts:
    """All ghosts of a master."""

    def __init__(
        self, table: ProcTable, nodes: NodeTable, streams: StreamBook, nursery: trio.Nursery, ledger: Ledger
    ) -> None:
        self.table = table
        self.ledger = ledger
        self.nodes = nodes
        self._streams = streams
        self.nursery = nursery
        self._away: dict[int, Away] = {}
        self._doomed: set[Process] = set()  # have ended, as was reported, while a migration owns them
        self.rescue: Callable[[Away], Awaitable[bool]] | None = None
        """Asked for every process whose node was lost: whether it lives on elsewhere."""
        nodes.listen(self._node_changed)
        self.families = Families(self)
        self.signals = Signals(self)
        self.reports = Reports(self)
        self._stops = Stops(self)

    def of(self, proc: Process) -> Away:
        """What stands for a process that is away.

        Raises:
            BpfsError: ESRCH, it has no ghost (any more).
        """
        away = self._away.get(proc.pid)
        if away is None or away.proc is not proc:
            raise BpfsError(errno.ESRCH, f"process {proc.pid} is not away")
        return away

    async def wait_born(self, proc: Process) -> None:
        """Waits, for a moment at most, for the ghost of a process that has just been forked on its node."""
        with trio.move_on_after(BORN_WITHIN):
            while proc.away and proc.status is None and proc.pid not in self._away:
                await trio.sleep(BORN_WITHIN / 100)

    def __len__(self) -> int:
        return len(self._away)

    def away_on(self, node: int) -> list[Away]:
        """All that is away on a node."""
        return [away for away in self._away.values() if away.proc.place == node]

    def note(self, away: Away) -> None:
        """Enters it into the ledger as it is now: the next master goes by that."""
        proc = away.proc
        if self._away.get(proc.pid) is away:
            self.families.orphans.know(proc)
            entry = entry_of(proc, away.stdio, away.real, away.stopped_by, away.stopped_after, away.bound)
            self.ledger.put(Part.AWAY, proc.pid, entry)

    def _drop(self, away: Away) -> None:
        pid = away.proc.pid
        if self._away.get(pid) is not away:
            return  # by now the pid is another's
        del self._away[pid]
        self.families.orphans.forget(pid)
        self.ledger.drop(Part.AWAY, pid)

    def adopt(self, proc: Process, ghost: Ghost, stdio: Stdio) -> Away:
        """Takes charge of a ghost that has just come to be (or anew, after a failed return)."""
        away = Away(proc, ghost, stdio)
        self.take_charge(away)
        return away

    def take_charge(self, away: Away) -> None:
        """Follows a ghost from now on."""
        proc, ghost = away.proc, away.ghost
        self._away[proc.pid] = away
        self.note(away)
        self._stops.some.set()
        if not proc.native:
            self.families.orphans.watch(proc)
        self.nursery.start_soon(carefully, proc.pid, ghost.run(), name=f"ghost {proc.pid}")
        self.nursery.start_soon(self._follow, away, name=f"events of ghost {proc.pid}")

    def stand_in(self, pid: int) -> Away | None:
        """What stands for the process with this pid, or None."""
        return self._away.get(pid)

    def all(self) -> Iterable[Away]:
        """What stands for all processes that are away."""
        return self._away.values()

    def orphans(self) -> set[int]:
        """The pids of those whose parents have no ghost that could tell of them."""
        return self._away.keys() - self.families.parents.keys()

    def in_session(self, sid: int) -> Away | None:
        """Some ghost of a session, or None."""
        return next((away for away in self._away.values() if away.proc.identity.sid == sid and away.real), None)

    def adopt_absent(self, proc: Process) -> Away:
        """Takes charge of a process whose ghost could not be made."""
        away = self._away[proc.pid] = Away(proc, NoGhost(proc.pid), Stdio())
        self.note(away)
        return away

    def retire(self, away: Away) -> None:
        """The ghost has become the process again, or is replaced: its end means nothing now."""
        away.retired = True
        self.families.forget(away)
        away.ghost.close()
        self._drop(away)

    @asynccontextmanager
    async def awake(self, away: Away) -> AsyncIterator[None]:
        """No signal meets the process half-way in this context, and its ghost can answer: one that is stopped goes on
        meanwhile, and stops again unless somebody has continued it."""
        async with away.calm():
            # One that was just told to stop may not have done so yet.
            stopped, continued = away.asked_stop or away.ghost.state() == "T", away.ghost.continued
            away.awake, away.to_stop = True, stopped
            if stopped:
                await tell(away.ghost.cont())
            try:
                yield
            finally:
                away.awake = False
                if away.to_stop and away.ghost.continued == continued:
                    with trio.CancelScope(shield=True):
                        await self._stop_again(away)

    async def _stop_again(self, away: Away) -> None:
        if not away.retired:
            await tell(away.ghost.stop(away.stopped_by))
        elif not away.asked_stop:  # it came home before it had heard of it
            with suppress(ProcessLookupError):
                os.kill(away.proc.pid, signal.SIGSTOP)

    async def look_after(self, away: Away) -> None:
        """A ghost that was retired too early; it may have ended meanwhile."""
        if away.ghost.gone:
            await carefully(away.proc.pid, self._gone(away))

    # -- from the ghost ----------------------------------------------------------------------------------------

    async def _follow(self, away: Away) -> None:
        async for event in away.ghost.events:
            await carefully(away.proc.pid, self._take(away, event))
            if isinstance(event, control.Signal | control.Child):
                await tell(away.ghost.seen())

    async def _take(self, away: Away, event: control.Event) -> None:
        match event:
            case control.Signal(signo=signo):
                away.ghost.conts += signo == signal.SIGCONT
                if self.signals.knows_already(away, event):
                    return
                if signo == signal.SIGCONT:
                    await self.signals.go_on(away, event)
                else:
                    await self.signals.send(away, signo, event.code, event.pid, event.uid, event.value)
            case control.Child():
                await self.families.changed(away, event)
            case control.ChildStopped():
                self._stops.look_below(away)
            case control.Interrupted():
                self._stops.debuggers.look(away.proc)
            case control.Gone():
                self._stops.debuggers.forget(away.proc)
                await self._gone(away)
            case control.Reborn():
                away.ghost.conts = 0
                await self._reconnect(away)
            case control.StreamLost(errno=code):
                _log.info("process %d: its stream ended (%s)", away.proc.pid, os.strerror(code) if code else "closed")
            case control.Adopted():
                await self._reconnect(away, event)
            case control.Stopped() | control.Continued():
                pass  # what was asked for has happened

    async def _gone(self, away: Away) -> None:
        if away.retired:
            return
        self.families.forget(away)
        proc = away.proc
        self._drop(away)
        if proc.status is not None:
            return
        # Nothing but SIGKILL ends a ghost that was not told to end.
        killed = ExitStatus(signal=signal.SIGKILL)
        if proc.state is ProcState.MIGRATING:
            proc.doom = killed
        try:
            await self.signals.send(away, signal.SIGKILL)
        except BpfsError as error:
            if error.errno != errno.ESRCH:  # else it has ended by itself, and its report finds no ghost any more
                raise
        if proc.state is not ProcState.MIGRATING and proc.status is None:
            self.table.end(proc, killed)

    async def _reconnect(self, away: Away, has: control.Adopted | None = None) -> None:
        """Gives a ghost its stream, where it has another one, or none: where a return home failed when its memory had
        been given up already, it is a new ghost now."""
        async with away.calm():
            if away.proc.place == MASTER or away.retired:
                return
            if has is not None and has.stream == away.stdio.stream:
                if has.held:
                    await away.ghost.resume()
                return
            session = self.nodes.get(away.proc.place).live_session()
            connection = await reconnect(session.link, self._streams, away.stdio.stream)
            await away.ghost.name(away.stdio.comm)
            await away.ghost.stream(connection, ghost_table(away.stdio.channels.values()), away.stdio.stream)

    # -- from the node -----------------------------------------------------------------------------------------

    async def identify(self, away: Away, identity: Identity) -> None:
        """This is what the process is now, and its ghost: name and arguments apart."""
        before, away.proc.identity = away.proc.identity, identity
        if identity == before:
            return
        self.note(away)
        if _ids(identity) == _ids(before):
            return
        if identity.pgid != before.pgid and self.stand_in(identity.pgid) not in (None, away):
            await _wait_led(identity.pgid)
        await tell(away.ghost.ids(*_ids(identity)))

    async def belongs(self, away: Away, pgid: int, sid: int, uid: int) -> None:
        """The process stands still and has these now. That it changed them its node may be about to tell."""
        before = away.proc.identity
        leader = self.stand_in(pgid)
        if pgid != before.pgid and leader is not None and leader is not away:
            await self.identify(leader, replace(leader.proc.identity, pgid=pgid, sid=sid))
        await self.identify(away, replace(before, pgid=pgid or before.pgid, sid=sid or before.sid, uid=uid))

    async def stopped(self, away: Away, signo: int) -> None:
        """The process was stopped on its node: so is its ghost."""
        proc = away.proc
        if proc.state is ProcState.RUNNING:
            proc.state = ProcState.STOPPED
            self.table.changed(proc, "stopped")
        elif proc.state is ProcState.MIGRATING:  # it is there already, and runs
            proc.before = ProcState.STOPPED
        away.asked_stop, away.stopped_by, away.stopped_after = True, signo, self.families.heard.get(proc.pid, 0)
        self.note(away)
        if away.awake:
            away.to_stop = True
        else:
            await tell(away.ghost.stop(signo))

    async def continued(self, away: Away) -> None:
        """The process goes on on its node: so does its ghost."""
        proc = away.proc
        if proc.state is ProcState.STOPPED:
            proc.state = ProcState.RUNNING
            self.table.changed(proc, "running")
        elif proc.state is ProcState.MIGRATING:
            proc.before = ProcState.RUNNING
        away.asked_stop = away.to_stop = False
        self.note(away)
        await tell(away.ghost.cont())

    async def ended(self, away: Away, status: ExitStatus) -> None:
        """The process has ended on its node; where a migration owns it, that sees to the rest."""
        proc = away.proc
        if proc.state is ProcState.MIGRATING:
            if proc.leaving:
                proc.unclaimed = status
            else:
                proc.doom = status
                self._doomed.add(proc)
            return
        await self.end(proc, status)

    async def end(self, proc: Process, status: ExitStatus) -> None:
        """The process has ended: so does its ghost, in the same way."""
        if proc.owed is not None:
            await proc.owed.settle()
        if proc.state is ProcState.ENDED:
            return
        stopped = proc.state is ProcState.STOPPED
        self.table.end(proc, status)
        away = self._away.get(proc.pid)
        if away is not None and away.proc is proc and not away.real:
            self._drop(away)
        elif away is not None and away.proc is proc:
            await self._carry_offsets(away)
            self._orphan(away)
            if status.signal is None:
                await tell(away.ghost.exit(status.code or 0))
            else:
                await tell(away.ghost.killed(status.signal, status.core))
            if stopped or away.ghost.state() == "T":
                await tell(away.ghost.cont())  # a stopped ghost would never hear of it

    def _orphan(self, parent: Away) -> None:
        with_it = [self._away[pid] for pid in parent.children & self._away.keys()]
        with_it = [child for child in with_it if child.proc.native and child.proc.place == parent.proc.place]
        stopped = {child.proc.identity.pgid for child in with_it if child.proc.state is ProcState.STOPPED}
        for child in with_it:
            if child.proc.identity.pgid in stopped:
                child.orphaned = trio.current_time()

    async def _carry_offsets(self, away: Away) -> None:
        session = self.nodes.get(away.proc.place).session
        if session is not None:
            await tell(carry_offsets(session.link, away.stdio, away.proc.pid))

    def is_idle(self) -> bool:
        """Whether all that nodes have reported has been dealt with, and no migration has still to."""
        self._doomed = {proc for proc in self._doomed if proc.doom is not None and proc.status is None}
        return not self._doomed and self.reports.is_idle()

    # -- from the files ----------------------------------------------------------------------------------------

    async def status_files(self, proc: Process, names: tuple[str, ...]) -> dict[str, bytes]:
        """Files of /proc/PID of a process wherever it is. Raises BpfsError."""
        if not proc.away:
            return await read_local(proc.pid, names)
        session = self.nodes.get(proc.place).live_session()
        reply = await session.link.request(messages.JobStatus(proc.pid, names), ANSWER_S)
        assert isinstance(reply, messages.JobStatusIs)
        return dict(zip(names, reply.texts, strict=True))

    # -- when a node goes --------------------------------------------------------------------------------------

    def _node_changed(self, node: Node, what: str) -> None:
        # Not at `state`: jobs of a node whose link was lost live on until it is surely fenced.
        if what == "fenced":
            for away in list(self._away.values()):
                if away.proc.place == node.number:
                    reason = f"node {node.number} was lost: {node.reason}"
                    self.nursery.start_soon(carefully, away.proc.pid, self._lost(away, reason))

    async def _lost(self, away: Away, reason: str) -> None:
        _log.info("process %d: %s", away.proc.pid, reason)
        if away.proc.state is ProcState.MIGRATING:
            away.proc.source_lost = True  # the migration may have a whole copy elsewhere
        elif self.rescue is None or not await self.rescue(away):
            if away.proc.owed is not None:
                away.proc.why = away.proc.why or reason
            await self.end(away.proc, ExitStatus(signal=signal.SIGKILL))

    async def end_all(self) -> None:
        """The master ends, and with it the jobs of all nodes: every ghost ends as if killed."""
        for away in list(self._away.values()):
            await self.ended(away, ExitStatus(signal=signal.SIGKILL))
        for away in list(self._away.values()):
            with trio.move_on_after(2.0):
                await away.ghost.wait_gone()


async def _wait_led(pgid: int) -> None:
    """Nobody can join a group whose leader's ghost has not yet obeyed."""
    with suppress(ProcessLookupError), trio.move_on_after(BORN_WITHIN):
        while os.getpgid(pgid) != pgid:
            await trio.sleep(BORN_WITHIN / 1000)


def _ids(identity: Identity) -> tuple[int, int, int, int]:
    return identity.sid, identity.pgid, identity.uid, identity.gid
