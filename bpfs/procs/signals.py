"""Signals on their way to processes that are away, each in its order."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from bpfs import log
from bpfs.errors import BpfsError, LinkClosed
from bpfs.nodes.registry import MASTER
from bpfs.procs import ghost as control
from bpfs.procs.away import NODE_TIMEOUT, SI_KERNEL, SI_QUEUE, SI_USER, Away, carefully, tell
from bpfs.procs.process import Process, ProcState
from bpfs.tree.base import Caller
from bpfs.wire import messages
from engine.linux import pidfd

if TYPE_CHECKING:
    from bpfs.procs.ghosts import Ghosts

ORPHANED = 1.0  # seconds from the end of a process to what the kernel does then to its ghost's children

_log = log.get("procs")


class Signals:
    """Those of a master."""

    def __init__(self, ghosts: Ghosts) -> None:
        self._ghosts = ghosts
        self._forwarding: dict[int, trio.Event] = {}  # receiver -> when the last signal for it has been passed on

    def is_idle(self) -> bool:
        """Whether all have been passed on."""
        return not self._forwarding

    async def signal(self, proc: Process, signo: int, caller: Caller) -> None:
        """Sends a signal to a process wherever it is.

        Raises:
            BpfsError: ESRCH, EHOSTDOWN.
        """
        if proc.away:
            await self._ghosts.wait_born(proc)
            await self.send(self._ghosts.of(proc), signo, SI_USER, caller.pid, caller.uid, patient=False)
            return
        try:
            os.kill(proc.pid, signo)
        except ProcessLookupError:
            raise BpfsError(errno.ESRCH, f"there is no process {proc.pid}") from None

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
            await self.send(away, signal.SIGCONT, code, pid, uid, value, replied)
        finally:
            replied()

    def knows_already(self, away: Away, event: control.Signal) -> bool:
        # A stopped group that is orphaned is hung up by the kernel; where the parent was on the node, that of the node.
        hung_up = event.code == SI_KERNEL and event.signo in (signal.SIGHUP, signal.SIGCONT)
        return hung_up and trio.current_time() < away.orphaned + ORPHANED

    def is_continuing(self, pid: int) -> bool:
        """Whether a SIGCONT is on its way to a process: it overtakes no stop that is reported now."""
        away = self._ghosts.stand_in(pid)
        return away is not None and bool(away.continuing)

    async def send(
        self, away: Away, signo: int, code: int = SI_USER, pid: int = 0, uid: int = 0, value: int = 0,
        replied: Callable[[], None] | None = None, patient: bool = True,
    ) -> None:  # fmt: skip
        message = messages.Signal(away.proc.pid, signo, code, pid, uid, value)
        async with away.calm():
            await self.send_now(away.proc, message, replied, patient)

    async def ask(
        self, place: int, message: messages.Message, replied: Callable[[], None] | None = None, patient: bool = True
    ) -> None:
        """Has a node do something, which may be done twice where its slave is started anew just then.

        Args:
            patient: wait for that slave, as long as the node may come back with its jobs.

        Raises:
            BpfsError: EHOSTDOWN; the node's own.
        """
        node = self._ghosts.nodes.get(place)
        while True:
            if patient:
                await node.wait_fenced()
            session = node.live_session()
            try:
                await session.link.request(message, NODE_TIMEOUT, replied)
                return
            except LinkClosed:
                if not patient:
                    raise
                await session.wait_ended()

    async def send_now(
        self, proc: Process, message: messages.Signal, replied: Callable[[], None] | None = None, patient: bool = True
    ) -> None:
        if proc.place != MASTER:
            await self.ask(proc.place, message, replied, patient)
            return
        try:
            os.kill(proc.pid, message.sig)
        except ProcessLookupError:  # it has just come home, and was killed and reaped right there
            raise BpfsError(errno.ESRCH, f"process {proc.pid} has ended") from None

    async def _continue_absent(self, away: Away) -> None:
        # Those of its group that have no ghost, which the same signal would have reached.
        proc = away.proc
        for other in list(self._ghosts.all()):
            theirs = other.proc
            if not other.real and theirs.place == proc.place and theirs.identity.pgid == proc.identity.pgid:
                await tell(self.send(other, signal.SIGCONT))

    def in_order(self, pid: int, work: Callable[[], Awaitable[None]]) -> None:
        """Passes a signal on once those before it have been: a SIGCONT that overtakes a SIGSTOP leaves its process
        stopped for ever."""
        before = self._forwarding.get(pid)
        self._forwarding[pid] = done = trio.Event()
        self._ghosts.nursery.start_soon(carefully, pid, self._after(before, done, pid, work))

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

    async def forward(self, report: messages.JobReport) -> None:
        # A job signalled a placeholder on its node: the signal is meant for the process that is elsewhere.
        try:
            target = self._ghosts.table.find(report.pid)
            if report.uid not in (0, target.identity.uid):
                return
            if report.status == signal.SIGCONT:
                self._ghosts.families.heard[report.pid] = report.stime_us
            who = report.code, report.sender, report.uid, report.value
            if target.away and report.status == signal.SIGCONT:
                await self._send_continue(self._ghosts.of(target), *who)
            elif target.away:
                await self.send(self._ghosts.of(target), report.status, *who)
            else:
                await self._signal_at_home(report)
        except OSError as error:
            _log.info("signal %d for process %d: %s", report.status, report.pid, error)

    async def _signal_at_home(self, report: messages.JobReport) -> None:
        sender = self._ghosts.stand_in(report.sender)
        # One that has ended since (a shell that kills its child, and exits) has a ghost that reads no more.
        lives = sender is not None and sender.real and sender.proc.state is not ProcState.ENDED
        if sender is not None and lives and sender.ghost.state() not in "TX":
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
