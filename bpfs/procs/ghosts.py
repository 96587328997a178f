"""Ghosts and what they stand for, kept in step: signals go out, stops and ends come back."""

from __future__ import annotations

import errno
import math
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.nodes.registry import MASTER, Node, NodeTable
from bpfs.procs import ghost as control
from bpfs.procs.debuggers import Debuggers
from bpfs.procs.entries import Bound, entry_of
from bpfs.procs.ghost import Ghost, NoGhost
from bpfs.procs.groups import Groups
from bpfs.procs.kernelfiles import ANSWER_S, read_local
from bpfs.procs.ledger import Ledger, Part
from bpfs.procs.parents import Parents
from bpfs.procs.process import ExitStatus, Process, ProcState
from bpfs.procs.stdio import Stdio, carry_offsets, reconnect
from bpfs.procs.table import ProcTable
from bpfs.tree.base import Caller
from bpfs.wire import messages
from bpfs.wire.mux import ghost_table
from bpfs.wire.streams import StreamBook
from engine.linux import pidfd

POLL = 0.25  # seconds between looks whether a ghost was stopped by SIGSTOP, which no program can catch
NODE_TIMEOUT = 30.0  # seconds for a node to carry out a signal
BORN_WITHIN = 1.0  # seconds that the ghost of a child may take that its parent has just made
SI_USER = 0
SI_QUEUE = -1
SI_TKILL = -6
SI_KERNEL = 0x80
ORPHANED = 1.0  # seconds from the end of a process to what the kernel does then to its ghost's children
SIGNAL_REPORT = 2  # kind of a report, csrc/nodeinit.h
UNCOUNTED = (1 << 31) - 1  # any number of SIGCONTs: an earlier master was told of them

_log = log.get("procs")


@dataclass(slots=True, eq=False)
class Away:
    """A process on a node, with all that the master holds for it.

    Attributes:
        quiet: held while a migration moves the process: signals wait that long.
        known: an earlier master's is waited for as well, until its node is back, or known to be lost.
        children: what its ghost has as children here, until the process has waited for them.
        continuing: SIGCONTs on their way to the node: stops that are reported before its answer were before them.
        asked_stop: the ghost was told to stop, or its being stopped has been passed on.
        stopped_by: the signal that its process was stopped by last.
        stopped_after: how many SIGCONTs to its stand-in had been passed on then.
        awake: its ghost has to answer: stops wait until that is over.
        to_stop: one does.
        orphaned: when its parent, which was on the same node, ended there, by trio's clock.
        bound: where it may run by now, while that is not known.
    """

    proc: Process
    ghost: Ghost
    stdio: Stdio
    quiet: trio.Lock = field(default_factory=trio.Lock)
    known: trio.Event | None = None
    asked_stop: bool = False
    stopped_by: int = signal.SIGSTOP
    stopped_after: int = 0
    retired: bool = False
    awake: bool = False
    to_stop: bool = False
    continuing: set[object] = field(default_factory=set)
    children: set[int] = field(default_factory=set)
    orphaned: float = -math.inf
    bound: Bound | None = None

    @asynccontextmanager
    async def calm(self) -> AsyncIterator[None]:
        """In this context the process is where it is, and can be told things there."""
        if self.known is not None:
            await self.known.wait()
        async with self.quiet:
            yield

    @property
    def real(self) -> bool:
        """Whether there is a ghost."""
        return not isinstance(self.ghost, NoGhost)


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
        self._parents = Parents(self)
        self._debuggers = Debuggers()
        self._groups = Groups(self)
        self.heard: dict[int, int] = {}
        """SIGCONTs from its stand-in, of who is a child elsewhere."""
        self._forwarding: dict[int, trio.Event] = {}  # receiver -> when the last signal for it has been passed on
        self.parents: dict[int, int] = {}
        """Child -> the process whose ghost has it (or its ghost) as a child, until that process has waited for it."""
        self._adopted = trio.Event()
        self._early: dict[int, tuple[int, list[Callable[[], Awaitable[object]]]]] = {}  # see `expect`
        self._reports, self._incoming = trio.open_memory_channel[Callable[[], Awaitable[object]]](math.inf)
        self._reporting = False
        self._doomed: set[Process] = set()  # have ended, as was reported, while a migration owns them
        self.rescue: Callable[[Away], Awaitable[bool]] | None = None
        """Asked for every process whose node was lost: whether it lives on elsewhere."""
        nodes.listen(self._node_changed)
        nursery.start_soon(self._take_reports, name="job reports")
        nursery.start_soon(self._watch_stops, name="stops of ghosts")

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
            entry = entry_of(proc, away.stdio, away.real, away.stopped_by, away.stopped_after, away.bound)
            self.ledger.put(Part.AWAY, proc.pid, entry)

    def _drop(self, pid: int) -> None:
        self._away.pop(pid, None)
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
        self._adopted.set()
        if not proc.native:
            self._parents.watch(proc)
        self.nursery.start_soon(carefully, proc.pid, ghost.run(), name=f"ghost {proc.pid}")
        self.nursery.start_soon(self._follow, away, name=f"events of ghost {proc.pid}")

    def stand_in(self, pid: int) -> Away | None:
        """What stands for the process with this pid, or None."""
        return self._away.get(pid)

    def all(self) -> Iterable[Away]:
        """What stands for all processes that are away."""
        return self._away.values()

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
        self._forget_children(away)
        away.ghost.close()
        if self._away.get(away.proc.pid) is away:
            self._drop(away.proc.pid)

    def expect(self, proc: Process, bound: Bound, stdio: Stdio) -> None:
        """A process may run elsewhere before we are told that it is gone from where it was: what is reported of it from
        there waits for `catch_up`."""
        self._early[proc.pid] = (bound.place, [])
        away = self._away.get(proc.pid)
        if away is not None:
            away.bound = bound
            self.note(away)
        else:
            self.ledger.put(Part.AWAY, proc.pid, entry_of(proc, stdio, True, signal.SIGSTOP, 0, bound))

    async def catch_up(self, proc: Process) -> None:
        """The process is at its new place: takes what was reported from there already."""
        _, early = self._early[proc.pid]
        while early:
            await carefully(proc.pid, early.pop(0)())
        del self._early[proc.pid]

    def is_continuing(self, pid: int) -> bool:
        """Whether a SIGCONT is on its way to a process: it overtakes no stop that is reported now."""
        away = self._away.get(pid)
        return away is not None and bool(away.continuing)

    def is_expected(self, pid: int, node: int) -> bool:
        """Whether a process may run on `node` though we have not been told yet."""
        return pid in self._early and self._early[pid][0] == node

    def defer(self, pid: int, node: Node, take: Callable[[], Awaitable[object]]) -> bool:
        """Whether what a node has reported of a process was put off to `catch_up`."""
        number, early = self._early.get(pid, (None, []))
        if number != node.number:
            return False
        early.append(take)
        return True

    def expect_no_more(self, proc: Process) -> None:
        """The move is off."""
        if self._early.pop(proc.pid, None) is None:
            return
        away = self._away.get(proc.pid)
        if away is not None:
            away.bound = None
            self.note(away)
        else:
            self.ledger.drop(Part.AWAY, proc.pid)

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
                if self._knows_already(away, event):
                    return
                if signo == signal.SIGCONT:
                    await self.go_on(away, event)
                else:
                    await self._send(away, signo, event.code, event.pid, event.uid, event.value)
            case control.Child():
                await self._child_changed(away, event)
            case control.Interrupted():
                self._debuggers.look(away.proc)
            case control.Gone():
                self._debuggers.forget(away.proc)
                await self._gone(away)
            case control.Reborn():
                await self._reconnect(away)
            case control.StreamLost(errno=code):
                _log.info("process %d: its stream ended (%s)", away.proc.pid, os.strerror(code) if code else "closed")
            case control.Adopted():
                await self._reconnect(away, event)
            case control.Stopped() | control.Continued():
                pass  # what was asked for has happened

    async def go_on(self, away: Away, event: control.Signal) -> None:
        """Passes a SIGCONT on. Raises BpfsError."""
        away.asked_stop = False
        await self._send_continue(away, event.code, event.pid, event.uid, event.value)
        await self._continue_absent(away)

    async def _send_continue(self, away: Away, code: int, pid: int, uid: int, value: int) -> None:
        this = object()
        away.continuing.add(this)

        def replied() -> None:
            away.continuing.discard(this)

        try:
            await self._send(away, signal.SIGCONT, code, pid, uid, value, replied)
        finally:
            replied()

    def _knows_already(self, away: Away, event: control.Signal) -> bool:
        # A stopped group that is orphaned is hung up by the kernel; where the parent was on the node, that of the node.
        hung_up = event.code == SI_KERNEL and event.signo in (signal.SIGHUP, signal.SIGCONT)
        return hung_up and trio.current_time() < away.orphaned + ORPHANED

    def has_child(self, away: Away, pid: int) -> None:
        """A process, or its ghost, is a child of this ghost."""
        self.parents[pid] = away.proc.pid
        away.children.add(pid)
        self.ledger.put(Part.CHILD, pid, int(away.proc.pid))

    async def waited_for(self, away: Away, pid: int) -> None:
        """The process has waited for a child: so does its ghost."""
        self.parents.pop(pid, None)
        self._groups.forget(pid)
        away.children.discard(pid)
        self.ledger.drop(Part.CHILD, pid)
        await tell(away.ghost.reap(pid))

    async def settle_family(self, away: Away, relatives: Sequence[Sequence[int]]) -> None:
        """The process stands still on its node, and has these children: it has waited for all others.

        Args:
            relatives: of the engine's summary; pids come first.

        Raises:
            BpfsError: EOPNOTSUPP, it would not hear any more what its parent or a child does.
        """
        children = {int(pid) for pid, *_ in relatives}
        with trio.move_on_after(BORN_WITHIN):
            while not children <= away.children:
                await trio.sleep(BORN_WITHIN / 100)
        if lost := sorted(children - away.children):
            raise BpfsError(errno.EOPNOTSUPP, f"its child {lost[0]} has no ghost on the master")
        for pid in away.children - children:
            await self.waited_for(away, pid)
        parent = self._away.get(away.proc.identity.ppid)
        if parent is not None and parent.proc.place == away.proc.place and away.proc.pid not in parent.children:
            raise BpfsError(errno.EOPNOTSUPP, f"the ghost of its parent {parent.proc.pid} cannot wait for its own")

    async def parted(self, away: Away, place: int) -> None:
        """The process has left a node, where children and parent of it may be: they hear of each other from afar."""
        for pid in away.children:
            child = self._away.get(pid)
            if child is not None and child.proc.place == place:
                child.proc.native = False
                self.note(child)
                self._parents.watch(child.proc)
        self._parents.watch(away.proc)
        parent = self._away.get(self.parents.get(away.proc.pid, 0))
        if parent is not None and parent.proc.away:
            await tell(parent.ghost.keep([away.proc.pid], also=True))

    def _forget_children(self, away: Away) -> None:
        for pid in away.children:
            self._groups.forget(pid)
            if self.parents.get(pid) == away.proc.pid:
                del self.parents[pid]
                self.ledger.drop(Part.CHILD, pid)

    async def keep_children(self, away: Away, children: list[int], along: Container[int] = ()) -> None:
        """The process is on a node, and these children of it are here: what stands for them there follows them.

        Args:
            along: processes that move with it: nothing has to stand for these.
        """
        for child in children:
            self.has_child(away, child)
        if elsewhere := [child for child in children if child not in along]:
            await tell(away.ghost.keep(elsewhere))

    async def _child_changed(self, away: Away, child: control.Child) -> None:
        async with away.calm():
            if away.proc.place == MASTER:
                return  # it has come home, and waits for it natively
            itself = self._away.get(child.pid)
            if itself is not None and itself.proc.place == away.proc.place:
                return  # they are together, and need nobody between them
            link = self.nodes.get(away.proc.place).live_session().link
            heard = itself.stopped_after if itself is not None else self.heard.get(child.pid, 0)
            if child.code not in (os.CLD_STOPPED, os.CLD_CONTINUED):
                self.heard.pop(child.pid, None)
            await link.request(messages.StandIn(child.pid, child.code, child.status, heard), NODE_TIMEOUT)

    async def _gone(self, away: Away) -> None:
        if away.retired:
            return
        self._forget_children(away)
        proc = away.proc
        self._drop(proc.pid)
        if proc.status is not None:
            return
        # Nothing but SIGKILL ends a ghost that was not told to end.
        killed = ExitStatus(signal=signal.SIGKILL)
        if proc.state is ProcState.MIGRATING:
            proc.doom = killed
        try:
            await self._send(away, signal.SIGKILL)
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

    async def _send(
        self, away: Away, signo: int, code: int = SI_USER, pid: int = 0, uid: int = 0, value: int = 0,
        replied: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        async with away.calm():
            await self._send_now(away.proc, messages.Signal(away.proc.pid, signo, code, pid, uid, value), replied)

    async def _send_now(
        self, proc: Process, message: messages.Signal, replied: Callable[[], None] | None = None
    ) -> None:
        if proc.place != MASTER:
            await self.nodes.get(proc.place).live_session().link.request(message, NODE_TIMEOUT, replied)
            return
        try:
            os.kill(proc.pid, message.sig)
        except ProcessLookupError:  # it has just come home, and was killed and reaped right there
            raise BpfsError(errno.ESRCH, f"process {proc.pid} has ended") from None

    async def _continue_absent(self, away: Away) -> None:
        # Those of its group that have no ghost, which the same signal would have reached.
        proc = away.proc
        for other in list(self._away.values()):
            theirs = other.proc
            if not other.real and theirs.place == proc.place and theirs.identity.pgid == proc.identity.pgid:
                await tell(self._send(other, signal.SIGCONT))

    async def _pass_stop(self, away: Away) -> None:
        async with away.calm():
            # It may have been continued since, and that may have been passed on already.
            if away.ghost.state() == "T":
                await self._send_now(away.proc, messages.Signal(away.proc.pid, signal.SIGSTOP, SI_USER, 0, 0, 0))
            else:
                away.asked_stop = False

    async def _watch_stops(self) -> None:
        while True:
            if not self._away:
                self._adopted = trio.Event()
                await self._adopted.wait()
            await trio.sleep(POLL)
            for away in list(self._away.values()):
                if away.ghost.gone or away.asked_stop or away.proc.state is not ProcState.RUNNING:
                    continue
                for child, session in self._groups.news(away):
                    self.nursery.start_soon(carefully, child, self._groups.tell(away, child, session))
                state = away.ghost.state()
                if state == "t":
                    self._debuggers.look(away.proc)
                elif state == "T":
                    away.asked_stop = True
                    self.nursery.start_soon(carefully, away.proc.pid, self._pass_stop(away))

    # -- from the node -----------------------------------------------------------------------------------------

    def report(self, node: Node, report: messages.JobReport) -> None:
        """Handler of JobReport; a plain function, for reports must be taken in their order."""
        if report.code == os.CLD_STOPPED and report.kind != SIGNAL_REPORT and self.is_continuing(report.pid):
            return
        self._reports.send_nowait(partial(self._reported, node, report))

    def after_reports(self, work: Callable[[], Awaitable[object]]) -> None:
        """Has something done when all that was reported up to now has been dealt with."""
        self._reports.send_nowait(work)

    def is_idle(self) -> bool:
        """Whether all that was reported has been dealt with, and no migration has still to."""
        if self._reporting or self._incoming.statistics().current_buffer_used or self._early or self._forwarding:
            return False
        self._doomed = {proc for proc in self._doomed if proc.doom is not None and proc.status is None}
        return not self._doomed

    async def _take_reports(self) -> None:
        async for work in self._incoming:
            self._reporting = True
            await work()
            self._reporting = False

    async def _reported(self, node: Node, report: messages.JobReport) -> None:
        if report.kind == SIGNAL_REPORT and self._has_sent(report):
            if report.status == signal.SIGCONT:
                self.heard[report.pid] = report.stime_us
        elif report.kind == SIGNAL_REPORT:
            self.in_order(report.pid, partial(self._forward, report))
        elif not self.defer(report.pid, node, partial(self._changed, node, report)):
            await carefully(report.pid, self._changed(node, report))

    def _has_sent(self, report: messages.JobReport) -> bool:
        """Whether a strict job has sent a signal that came to a placeholder: it was passed on before (strict.py)."""
        sender = self.table.known(report.sender)
        return sender is not None and sender.strict and report.code in (SI_USER, SI_QUEUE, SI_TKILL)

    async def _changed(self, node: Node, report: messages.JobReport) -> None:
        away = self._away.get(report.pid)
        if away is None or away.proc.place != node.number:
            return
        match report.code:
            case os.CLD_STOPPED if not away.proc.pledged:
                await self.stopped(away, report.status)
            case os.CLD_CONTINUED:
                await self.continued(away)
            case os.CLD_EXITED | os.CLD_KILLED | os.CLD_DUMPED:
                await self.ended(away, _status(report))

    async def stopped(self, away: Away, signo: int) -> None:
        """The process was stopped on its node: so is its ghost."""
        proc = away.proc
        if proc.state is ProcState.RUNNING:
            proc.state = ProcState.STOPPED
            self.table.changed(proc, "stopped")
        away.asked_stop, away.stopped_by, away.stopped_after = True, signo, self.heard.get(proc.pid, 0)
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
            self._drop(proc.pid)
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

    def in_order(self, pid: int, work: Callable[[], Awaitable[None]]) -> None:
        """Passes a signal on once those before it have been: a SIGCONT that overtakes a SIGSTOP leaves its process
        stopped for ever."""
        before = self._forwarding.get(pid)
        self._forwarding[pid] = done = trio.Event()
        self.nursery.start_soon(carefully, pid, self._after(before, done, pid, work))

    async def _after(
        self, before: trio.Event | None, done: trio.Event, pid: int, work: Callable[[], Awaitable[None]]
    ) -> None:
        if before is not None:
            await before.wait()
        try:
            await work()
        finally:
            done.set()
            if self._forwarding.get(pid) is done:
                del self._forwarding[pid]

    async def _forward(self, report: messages.JobReport) -> None:
        # A job signalled a placeholder on its node: the signal is meant for the process that is elsewhere.
        try:
            target = self.table.find(report.pid)
            if report.uid not in (0, target.identity.uid):
                return
            if report.status == signal.SIGCONT:
                self.heard[report.pid] = report.stime_us
            who = report.code, report.sender, report.uid, report.value
            if target.away and report.status == signal.SIGCONT:
                await self._send_continue(self.of(target), *who)
            elif target.away:
                await self._send(self.of(target), report.status, *who)
            else:
                await self._signal_at_home(report)
        except OSError as error:
            _log.info("signal %d for process %d: %s", report.status, report.pid, error)

    async def _signal_at_home(self, report: messages.JobReport) -> None:
        sender = self._away.get(report.sender)
        if sender is not None and sender.real and sender.ghost.state() not in "TX":
            await sender.ghost.send_signal(report.pid, report.status, report.code, report.value)
            return
        process = os.pidfd_open(report.pid)
        try:
            if report.code == SI_QUEUE:
                pidfd.queue(process, report.status, report.value, report.uid, sender=report.sender)
            else:
                pidfd.send(process, report.status)
        finally:
            os.close(process)

    # -- from the files ----------------------------------------------------------------------------------------

    async def signal(self, proc: Process, signo: int, caller: Caller) -> None:
        """Sends a signal to a process wherever it is.

        Raises:
            BpfsError: ESRCH, EHOSTDOWN.
        """
        if proc.away:
            await self.wait_born(proc)
            await self._send(self.of(proc), signo, SI_USER, caller.pid, caller.uid)
            return
        try:
            os.kill(proc.pid, signo)
        except ProcessLookupError:
            raise BpfsError(errno.ESRCH, f"there is no process {proc.pid}") from None

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


def _status(report: messages.JobReport) -> ExitStatus:
    if report.code == os.CLD_EXITED:
        return ExitStatus(code=report.status & 0xFF)
    return ExitStatus(signal=report.status, core=report.code == os.CLD_DUMPED)


async def carefully(pid: int, work: Awaitable[object]) -> None:
    """Does something for one process. Its trouble must not end the master, and every other process with it."""
    try:
        await work
    except BpfsError as error:
        _log.warning("process %d: %s", pid, error)
    except Exception as error:
        _log.error("process %d: failed in an unforeseen way", pid, exc_info=error)


async def tell(sending: Awaitable[None]) -> None:
    """Waits for a packet to a ghost to be sent; a ghost that is gone is no error here."""
    try:
        await sending
    except BpfsError as error:
        _log.info("%s", error)  # it was killed just now: its own Gone event deals with that
