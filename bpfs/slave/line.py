"""The slave's line to its master: one link after another, for a master that was started anew finds its jobs again.

What is asked over the line fails while there is no link. What jobs did is not lost: reports wait for the next link, and
those that the last master may have had no time for are told once more.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, TypeGuard

from bpfs.errors import LinkClosed
from bpfs.wire.link import Handlers, Link
from bpfs.wire.messages import JobEvents, JobReport, Message
from engine.jobspace import Kind
from engine.jobwatch import without_ends

MOST_KEPT = 50_000
"""Reports kept at most: some 10 MB. A master that is so far behind has a storm of forks to deal with, and has dealt
with what is older than that."""

_ENDS = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)


@dataclass(slots=True)
class _Report:
    message: Message
    sent: bool


class Line:
    """What the parts of a slave talk to."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._reports: deque[_Report] = deque(maxlen=MOST_KEPT)  # those not known to have been dealt with, oldest first
        self._told = 0  # reports over this link
        self._taken = 0  # of those the master has dealt with

    @property
    def link(self) -> Link:
        """The link of now; it may have ended."""
        return self._link

    async def run(self, handlers: Handlers) -> str:
        """Serve the link of now until it ends; gives the reason."""
        return await self._link.run(handlers)

    async def request(self, message: Message, timeout: float | None = None) -> Any:
        """As `Link.request`."""
        return await self._link.request(message, timeout)

    async def notify(self, message: Message) -> None:
        """As `Link.notify`."""
        await self._link.notify(message)

    def notify_nowait(self, message: Message) -> None:
        """As `Link.notify_nowait`; a report of jobs never fails: it waits for the next link.

        Raises:
            LinkClosed: the link is gone.
        """
        if not isinstance(message, JobReport | JobEvents):
            self._link.notify_nowait(message)
            return
        report = _Report(message, False)
        self._reports.append(report)
        if not self._link.reason:
            self._send(report)

    def taken(self, count: int) -> None:
        """The master has dealt with so many reports of this link."""
        while self._taken < count and self._reports and self._reports[0].sent:
            self._reports.popleft()
            self._taken += 1
        self._taken = max(self._taken, count)

    def take_over(self, link: Link, alive: Container[int]) -> None:
        """Go on over a new link, to another master: tell it what its predecessor may not know.

        Of what was told already only what does no harm when it is told twice: ends, and what jobs are like by now.

        Args:
            alive: pids of all jobs. One that is told to have ended was a copy of it whose move failed.
        """
        self._link = link
        self._told = self._taken = 0
        kept = [report for report in self._reports if not report.sent or _may_come_twice(report.message)]
        self._reports.clear()
        last = {report.message.pid: report for report in kept if _is_end(report.message)}
        for report in kept:
            message = report.message
            if isinstance(message, JobEvents):
                report.message = JobEvents(without_ends(message.records, alive))
            elif _is_end(message) and (message.pid in alive or last[message.pid] is not report):
                continue
            self._reports.append(report)
            self._send(report)

    def close(self, reason: str) -> None:
        """End the link."""
        self._link.close(reason)

    def _send(self, report: _Report) -> None:
        try:
            self._link.notify_nowait(report.message)
        except LinkClosed:
            return
        report.sent = True
        self._told += 1


def _may_come_twice(message: Message) -> bool:
    return isinstance(message, JobEvents) or _is_end(message)


def _is_end(message: Message) -> TypeGuard[JobReport]:
    return isinstance(message, JobReport) and message.kind == Kind.CHILD and message.code in _ENDS
