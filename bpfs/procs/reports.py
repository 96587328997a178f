"""What nodes report of their jobs, taken one after the other; and what comes of processes that are about to arrive."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import trio

from bpfs.nodes.registry import Node
from bpfs.procs.away import SI_QUEUE, SI_TKILL, SI_USER, carefully
from bpfs.procs.entries import Bound, entry_of
from bpfs.procs.ledger import Part
from bpfs.procs.process import ExitStatus, Process
from bpfs.procs.stdio import Stdio
from bpfs.wire import messages

if TYPE_CHECKING:
    from bpfs.procs.ghosts import Ghosts

SIGNAL_REPORT = 2  # kind of a report, csrc/nodeinit.h


@dataclass(slots=True)
class _Early:
    """Reports of a process that is expected at a place."""

    place: int
    since: float  # by trio's clock
    reports: list[Callable[[], Awaitable[object]]] = field(default_factory=list)


class Reports:
    """Those to one master."""

    def __init__(self, ghosts: Ghosts) -> None:
        self._ghosts = ghosts
        self._early: dict[int, _Early] = {}  # see `expect`
        self._reports, self._incoming = trio.open_memory_channel[Callable[[], Awaitable[object]]](math.inf)
        self._reporting = False
        ghosts.nursery.start_soon(self._take_all, name="job reports")

    def take(self, node: Node, report: messages.JobReport) -> None:
        """Handler of JobReport; a plain function, for reports must be taken in their order."""
        stops = report.kind != SIGNAL_REPORT and report.code == os.CLD_STOPPED
        if stops and self._ghosts.signals.is_continuing(report.pid):
            return
        self._reports.send_nowait(partial(self._reported, node, report, trio.current_time()))

    def after(self, work: Callable[[], Awaitable[object]]) -> None:
        """Has something done when all that was reported up to now has been dealt with."""
        self._reports.send_nowait(work)

    def is_idle(self) -> bool:
        """Whether all that was reported has been dealt with, and no migration has still to."""
        if self._reporting or self._incoming.statistics().current_buffer_used or self._early:
            return False
        return self._ghosts.signals.is_idle()

    async def _take_all(self) -> None:
        async for work in self._incoming:
            self._reporting = True
            await work()
            self._reporting = False

    async def _reported(self, node: Node, report: messages.JobReport, since: float) -> None:
        if report.kind == SIGNAL_REPORT and self._has_sent(report):
            if report.status == signal.SIGCONT:
                self._ghosts.families.heard[report.pid] = report.stime_us
        elif report.kind == SIGNAL_REPORT:
            self._ghosts.signals.in_order(report.pid, partial(self._ghosts.signals.forward, report))
        elif not self.defer(report.pid, node, since, partial(self._changed, node, report)):
            await carefully(report.pid, self._changed(node, report))

    def _has_sent(self, report: messages.JobReport) -> bool:
        """Whether a strict job has sent a signal that came to a placeholder: it was passed on before (strict.py)."""
        sender = self._ghosts.table.known(report.sender)
        return sender is not None and sender.strict and report.code in (SI_USER, SI_QUEUE, SI_TKILL)

    async def _changed(self, node: Node, report: messages.JobReport) -> None:
        away = self._ghosts.stand_in(report.pid)
        if away is None or away.proc.place != node.number:
            return
        match report.code:
            case os.CLD_STOPPED if not away.proc.pledged:
                await self._ghosts.stopped(away, report.status)
            case os.CLD_CONTINUED:
                await self._ghosts.continued(away)
            case os.CLD_EXITED | os.CLD_KILLED | os.CLD_DUMPED:
                await self._ghosts.ended(away, _status(report))

    # -- processes that may have arrived ---------------------------------------------------------------------------

    def expect(self, proc: Process, bound: Bound, stdio: Stdio) -> None:
        """A process may run elsewhere before we are told that it is gone from where it was: what is reported of it from
        there waits for `catch_up`."""
        self._early[proc.pid] = _Early(bound.place, trio.current_time())
        self.note_bound(proc, bound, stdio)

    def note_bound(self, proc: Process, bound: Bound, stdio: Stdio) -> None:
        """What the next master is to know of where an expected process may run."""
        away = self._ghosts.stand_in(proc.pid)
        if away is not None:
            away.bound = bound
            self._ghosts.note(away)
        else:
            self._ghosts.ledger.put(Part.AWAY, proc.pid, entry_of(proc, stdio, True, signal.SIGSTOP, 0, bound))

    async def catch_up(self, proc: Process) -> None:
        """The process is at its new place: takes what was reported from there already."""
        reports = self._early[proc.pid].reports
        while reports:
            await carefully(proc.pid, reports.pop(0)())
        del self._early[proc.pid]

    def is_expected(self, pid: int, node: int) -> bool:
        """Whether a process may run on `node` though we have not been told yet."""
        return pid in self._early and self._early[pid].place == node

    def defer(self, pid: int, node: Node, since: float, take: Callable[[], Awaitable[object]]) -> bool:
        """Whether what a node reported of a process, at `since` by trio's clock, was put off to `catch_up`. What came
        before it was expected is not: that is of an earlier stay."""
        early = self._early.get(pid)
        if early is None or early.place != node.number or since < early.since:
            return False
        early.reports.append(take)
        return True

    def expect_no_more(self, proc: Process) -> None:
        """The move is off."""
        if self._early.pop(proc.pid, None) is None:
            return
        away = self._ghosts.stand_in(proc.pid)
        if away is not None:
            away.bound = None
            self._ghosts.note(away)
        else:
            self._ghosts.ledger.drop(Part.AWAY, proc.pid)


def _status(report: messages.JobReport) -> ExitStatus:
    if report.code == os.CLD_EXITED:
        return ExitStatus(code=report.status & 0xFF)
    return ExitStatus(signal=report.status, core=report.code == os.CLD_DUMPED)
