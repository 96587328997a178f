"""Ghosts for what jobs fork: made, kept in step and ended as jobwatch on the node tells (engine/jobwatch.py).

A child's ghost is a child of its parent's ghost, which makes it; where there is none (any more) some other ghost of
its session does, and leaves it to init. It has the pid that the node gave the child. It stays a zombie as long as the
child does: should the parent come home before it waits, it finds the status there.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial

import trio
import trio.lowlevel

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.nodes.blocks import Blocks
from bpfs.nodes.registry import Node, NodeTable
from bpfs.procs.away import SI_USER, Away, carefully, tell
from bpfs.procs.ghost import Birth, Ghost, Signal
from bpfs.procs.ghosts import Ghosts
from bpfs.procs.kernelfiles import ANSWER_S
from bpfs.procs.process import ExitStatus, Identity, Pid, Process, ProcState
from bpfs.procs.stdio import Stdio
from bpfs.procs.table import read_identity
from bpfs.tree.base import Caller
from bpfs.wire import messages
from engine.jobwatch import Kind, Record, parse

AGAIN = 0.002  # seconds until a pid that an ended ghost still has is tried again
AGAIN_TIMES = 25

TURN = 0.02  # seconds at most that pid_max stays raised
LATE = 0.05  # seconds that what a node tells may be old
SIGCONT = Signal(signal.SIGCONT, SI_USER, 0, 0, 0)
SLOW = 0.02  # seconds after which others are taken beside one whose parent's ghost does not answer
STANDS_WITHIN = 3.0  # seconds for a ghost that somebody waits for
EXPECTED = 2.0  # seconds at most that a parent's ghost may take to be known, once the parent runs on the node

_log = log.get("procs")


class Births:
    """What all nodes tell of their jobs, taken one after the other; but nobody waits for long for somebody else."""

    def __init__(self, ghosts: Ghosts, nodes: NodeTable, blocks: Blocks, nursery: trio.Nursery) -> None:
        self._ghosts = ghosts
        self._table = ghosts.table
        self._nodes = nodes
        self._blocks = blocks
        self._complained: set[int] = set()  # nodes of which a child could not be shown
        self._waiting: dict[tuple[int, int], tuple[Node, list[Record]]] = {}  # by node and pid, oldest first
        self._since: dict[tuple[int, int], float] = {}  # when the first of these was told, by trio's clock
        self._taking: set[tuple[int, int]] = set()  # these may be in the middle of their births
        self._wake = trio.Event()
        self._stood_for: dict[int, trio.Event] = {}  # who is waited for until it has a ghost
        self._raised = AsyncExitStack()
        self._is_raised = False
        self._raising = trio.Lock()
        nursery.start_soon(self._take_all, name="births")

    def report(self, node: Node, message: messages.JobEvents) -> None:
        """Handler of JobEvents; a plain function, for they must be taken in their order."""
        try:
            for record in parse(message.records):
                self._put(node, record)
        except (ValueError, struct.error) as error:
            _log.warning("node %d told nonsense of its jobs: %s", node.number, error)
        self._wake.set()

    async def ghost_of(self, node: Node, message: messages.GhostOf) -> None:
        """Handler: a strict job has forked, and stands still until its child has a ghost."""
        if self._ghosts.stand_in(message.pid) is not None:
            return
        stands = self._stood_for.setdefault(message.pid, trio.Event())
        with trio.move_on_after(STANDS_WITHIN):
            await stands.wait()
        if not stands.is_set():
            self._stood_for.pop(message.pid, None)
            raise BpfsError(errno.ETIMEDOUT, f"process {message.pid} of node {node.number} has no ghost yet")

    def is_idle(self) -> bool:
        """Whether nothing waits to be taken."""
        return not self._waiting and not self._taking

    def _put(self, node: Node, record: Record) -> None:
        key = (int(node.number), record.pid)
        if record.state == "T" and self._ghosts.signals.is_continuing(record.pid):
            record = replace(record, state="S")
        waiting = self._waiting.setdefault(key, (node, []))[1]
        waiting.append(record)
        self._since.setdefault(key, trio.current_time())
        # In a storm of forks we are late, and who has come and gone meanwhile is nobody's business any more.
        unborn = self._table.known(record.pid) is None and key not in self._taking
        if record.kind is Kind.REAPED and waiting[0].kind is Kind.IS and unborn:
            del self._waiting[key], self._since[key]

    async def _take_all(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                self._wake = trio.Event()
                if self._next() is None:
                    await self._wake.wait()
                until = trio.current_time() + TURN
                while (key := self._next()) is not None and trio.current_time() < until:
                    await self._take_one(nursery, key)
                if not self._taking:
                    await self._raised.aclose()
                    self._is_raised = False
                await trio.lowlevel.checkpoint()

    def _next(self) -> tuple[int, int] | None:
        """The oldest that need not wait for itself or its parent."""
        busy = {pid for _, pid in self._taking}
        for key, (_, records) in self._waiting.items():
            if not busy or busy.isdisjoint((key[1], records[0].ppid)):
                return key
        return None

    async def _take_one(self, nursery: trio.Nursery, key: tuple[int, int]) -> None:
        node, records = self._waiting.pop(key)
        since, done = self._since.pop(key), trio.Event()
        self._taking.add(key)

        async def take() -> None:
            for record in records:
                await carefully(record.pid, self._take(node, record, since))
            self._taking.remove(key)
            self._wake.set()
            done.set()

        nursery.start_soon(take, name=f"what process {key[1]} does")
        with trio.move_on_after(SLOW):
            await done.wait()

    async def _raise(self) -> None:
        # Once for all births of a turn: it costs as much as a birth.
        async with self._raising:
            if not self._is_raised:
                await self._raised.enter_async_context(self._blocks.raised())
                self._is_raised = True

    async def _take(self, node: Node, record: Record, since: float) -> None:
        if record.kind is Kind.REAPED:
            await self._reaped(node, record.pid)
            return
        if record.kind is Kind.STOOD:
            self._stood(node, record)
            return
        proc = self._table.known(record.pid)
        if proc is None:
            if record.kind is Kind.IS and record.pid in self._blocks.of(node.number):
                await self._born(node, record, since)
            return
        if not self._ghosts.reports.defer(record.pid, node, since, partial(self._known, node, proc, record)):
            await self._known(node, proc, record)

    async def _known(self, node: Node, proc: Process, record: Record) -> None:
        if proc.place != node.number:
            return
        away = self._ghosts.stand_in(record.pid)
        if away is None or away.proc is not proc:
            return
        if record.kind is Kind.ENDED:
            if self._has_parent_there(proc):
                await self._ghosts.ended(away, status_of(record.code))
        elif proc.state is not ProcState.MIGRATING:
            await self._changed(away, record)

    def _has_parent_there(self, proc: Process) -> bool:
        """Whether its parent alone hears of its end and stops, being on the same node; else nodeinit reports them."""
        parent = self._ghosts.stand_in(proc.identity.ppid)
        return proc.native or (parent is not None and parent.proc.place == proc.place)

    # -- births ------------------------------------------------------------------------------------------------

    async def _born(self, node: Node, record: Record, since: float) -> None:
        with trio.move_on_after(EXPECTED):
            while self._ghosts.reports.is_expected(record.ppid, int(node.number)):
                await trio.sleep(AGAIN)
        parent = self._ghosts.stand_in(record.ppid)
        groups = frozenset[int]()
        if parent is not None and parent.proc.identity.uid == record.uid:
            groups = parent.proc.identity.groups
        identity = Identity(record.uid, record.gid, record.ppid, record.pgid, record.sid, groups, 0, record.cmdline)
        proc = Process(Pid(record.pid), identity, int(node.number), native=True)
        if parent is not None:
            proc.wants_strict, proc.strict = parent.proc.wants_strict, parent.proc.strict
        self._table.add(proc)
        continued = False
        try:
            continued = await self._make_ghost(proc, parent, record, since)
        except BpfsError as error:
            self._ghosts.adopt_absent(proc)
            if node.number not in self._complained:
                self._complained.add(node.number)
                _log.warning("process %d of node %d, and maybe others, cannot be shown here: %s",
                             record.pid, node.number, error)  # fmt: skip
        if (stands := self._stood_for.pop(record.pid, None)) is not None:
            stands.set()
        self._table.changed(proc, f"forked by {record.ppid}")
        if continued:  # whatever it was told to be: its stop may have been just under way
            await self._ghosts.signals.go_on(self._ghosts.of(proc), SIGCONT)
        elif record.state == "T":
            await self._ghosts.stopped(self._ghosts.of(proc), signal.SIGSTOP)

    async def _make_ghost(self, proc: Process, parent: Away | None, record: Record, since: float) -> bool:
        """Returns whether its group has been continued meanwhile, by a signal that did not find it: it may come late,
        as a stopped ghost makes no other."""
        maker = parent if parent is not None and parent.real else self._ghosts.in_session(record.sid)
        if maker is None or maker.ghost.state() == "T":
            raise BpfsError(errno.ESRCH, "no ghost of its session can make one")
        birth = Birth(
            record.pid, record.pgid, record.sid, record.uid, record.gid, maker is not parent, record.tty != 0,
            record.comm, record.cmdline,
        )  # fmt: skip
        ours, theirs = Ghost.pair()
        with theirs:
            try:
                await self._raise()
                continued = await self._bear(maker.ghost, birth, theirs)
            except BaseException:
                ours.close()
                raise
        with suppress(BpfsError):  # killed already, which its process shall learn as always
            proc.identity = replace(proc.identity, start=read_identity(proc.pid).start)
        self._ghosts.adopt(proc, Ghost(proc.pid, ours), Stdio(comm=record.comm))
        if maker is parent:
            self._ghosts.families.has_child(parent, proc.pid)
        if maker.proc.identity.pgid != record.pgid:
            return False
        return continued or maker.ghost.continued > since - LATE

    async def _bear(self, maker: Ghost, birth: Birth, child: socket.socket) -> bool:
        attempt = 1
        while True:
            try:
                return await maker.bear(birth, child)
            except BpfsError as error:
                if error.code != errno.EEXIST or attempt == AGAIN_TIMES:
                    raise
            attempt += 1
            await trio.sleep(AGAIN)

    # -- changes -----------------------------------------------------------------------------------------------

    async def _changed(self, away: Away, record: Record) -> None:
        proc, before = away.proc, away.proc.identity
        after = replace(
            before, uid=record.uid, gid=record.gid, ppid=record.ppid if proc.native else before.ppid,
            pgid=record.pgid or before.pgid, sid=record.sid or before.sid, cmdline=record.cmdline or before.cmdline,
        )  # fmt: skip
        if record.comm != away.stdio.comm:
            away.stdio.comm = record.comm
            self._ghosts.note(away)
            await tell(away.ghost.name(record.comm))
        await self._ghosts.identify(away, after)
        if after.cmdline != before.cmdline:
            await tell(away.ghost.arguments(after.cmdline))
        theirs = self._has_parent_there(proc)
        if theirs and record.state == "T" and proc.state is ProcState.RUNNING:
            await self._ghosts.stopped(away, signal.SIGSTOP)
        elif theirs and record.state != "T" and proc.state is ProcState.STOPPED:
            await self._ghosts.continued(away)

    # -- what its parent did to what stands for a child there -----------------------------------------------------

    def _stood(self, node: Node, record: Record) -> None:
        """SIGKILL and SIGSTOP cannot be passed on by whom they reach. So they are guessed, where nobody of ours has
        ended or stopped what stands for a child, and its parent lives."""
        parent = self._ghosts.stand_in(self._ghosts.families.parents.get(record.pid, 0))
        if parent is None or parent.proc.place != node.number or parent.proc.leaving:
            return
        child = self._table.known(record.pid)
        if child is not None and (child.place == node.number or child.state in (ProcState.MIGRATING, ProcState.ENDED)):
            return
        if record.state == "T":
            work = partial(self._pass_on, parent, record.pid, child, signal.SIGSTOP)
        elif record.code < 0 or record.code & 0x7F == signal.SIGKILL:  # nobody saw how it ended: not by order
            work = partial(self._pass_on, parent, record.pid, child, signal.SIGKILL)
        else:
            return
        self._ghosts.signals.in_order(record.pid, work)

    async def _pass_on(self, parent: Away, pid: int, child: Process | None, signo: signal.Signals) -> None:
        link = self._nodes.get(parent.proc.place).live_session().link
        reply = await link.request(messages.JobsStatus((parent.proc.pid, pid), ("status",)), ANSWER_S)
        assert isinstance(reply, messages.JobsStatusAre)
        status, stand_in = reply.texts
        if not _lives(status):  # the whole node may be ending just now
            return
        if signo == signal.SIGSTOP and b"\nState:\tT" not in stand_in:
            return  # it has been continued already, and that may have been passed on
        if child is not None and child.away:
            await self._ghosts.signals.signal(child, signo, Caller(parent.proc.pid, parent.proc.identity.uid, 0))
        elif read_identity(Pid(pid)).ppid == parent.proc.pid:  # at home, below its parent's ghost
            os.kill(pid, signo)

    # -- ends --------------------------------------------------------------------------------------------------

    async def _reaped(self, node: Node, pid: int) -> None:
        # While its parent moves, what stood for it at the old place goes unwaited for; see `Families.settle`.
        parent = self._ghosts.stand_in(self._ghosts.families.parents.get(pid, 0))
        if parent is None or parent.proc.place != node.number or parent.proc.state is ProcState.MIGRATING:
            return
        await self._ghosts.families.waited_for(parent, pid)


def _lives(status: bytes) -> bool:
    """Whether the process of a /proc/PID/status is neither dead nor about to die by SIGKILL."""
    if not status:
        return False
    fields = dict(line.split(b":\t", 1) for line in status.splitlines() if b":\t" in line)
    pending = int(fields[b"ShdPnd"], 16) | int(fields[b"SigPnd"], 16)
    return fields[b"State"][:1] not in b"ZX" and not pending >> (signal.SIGKILL - 1) & 1


def status_of(code: int) -> ExitStatus:
    """What a wait status (wait(2)) says; -1: nobody knows, which happens to what a killed parent leaves."""
    if code < 0:
        return ExitStatus(signal=signal.SIGKILL)
    if os.WIFSIGNALED(code):
        return ExitStatus(signal=os.WTERMSIG(code), core=os.WCOREDUMP(code))
    return ExitStatus(code=os.WEXITSTATUS(code))
