"""The slave's line to its master: one link after another, for a master that was started anew finds its jobs again, and
so does a bpslave.

What is asked over the line fails while there is no link. What jobs did is not lost: reports wait for the next link
(spool.py). A master that has gone on tells which of them it has had; another one is told once more what its
predecessor may have had no time for.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Container
from errno import ENOBUFS
from typing import Any

from bpfs import log
from bpfs.errors import LinkClosed
from bpfs.slave.spool import Slot, Source, Spool
from bpfs.wire.link import Handlers, Link
from bpfs.wire.messages import JobEvents, JobReport, Message
from engine.jobspace import Kind, Report
from engine.jobwatch import still_news

_ENDS = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)

_log = log.get("wire")


class Line:
    """What the parts of a slave talk to."""

    def __init__(self, link: Link, spool: Spool) -> None:
        """Args:
        spool: reports that are not known to have been dealt with.
        """
        self._link = link
        self._spool = spool
        self._before = spool.last  # number of the last report before this link

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
        """As `Link.notify_nowait`."""
        self._link.notify_nowait(message)

    @property
    def told(self) -> int:
        """The number of the last report that was told."""
        return self._spool.last

    # -- reports -----------------------------------------------------------------------------------

    def receive(self, sock: socket.socket, source: Source) -> Slot | None:
        """Take a packet of reports from a socket; it is to be told or dropped then. None at the socket's end.

        Raises:
            BlockingIOError: there is none.
        """
        try:
            return self._spool.receive(sock, source)
        except OSError as error:
            if error.errno != ENOBUFS:
                raise
        self._make_room()
        return self._spool.receive(sock, source)

    def _make_room(self) -> None:
        # A master that is so far behind has a storm of forks to deal with, and has dealt with what is older than that.
        _log.warning("%d reports to the master are given up: it has not dealt with any of them", len(self._spool))
        for slot in self._spool:
            self._spool.drop(slot)

    def report(self, packet: bytes, source: Source) -> None:
        """Tell the master something that has come another way."""
        self.tell(self._spool.put(packet, source))

    def tell(self, slot: Slot, data: bytes | None = None) -> None:
        """Have the master told, over this link or the next.

        Args:
            data: what is left of it, where not all of it is news; None: all is.
        """
        if self._link.reason:
            return
        self._spool.last += 1
        slot.told = self._spool.last  # before it can have been heard
        try:
            self._link.notify_nowait(_message(slot, slot.data if data is None else data))
        except LinkClosed:
            slot.told = 0

    def drop(self, slot: Slot) -> None:
        """It is nothing that the master has to hear of."""
        self._spool.drop(slot)

    def taken(self, count: int) -> None:
        """The master has dealt with so many reports of this link."""
        for slot in self._spool:
            if not 0 < slot.told <= self._before + count:
                break
            self._spool.drop(slot)

    def take_over(self, link: Link, alive: Container[int], heard: int | None) -> None:
        """Go on over a new link: tell what the master does not know.

        Args:
            alive: pids of all jobs. One that is told to have ended was a copy of it whose move failed.
            heard: number of the last report that this very master has had; None: it is another one. Then, of what
                was told already, only what does no harm when it is told twice is told: ends, and what jobs are like.
        """
        self._link, self._before = link, self._spool.last
        for slot in self._spool:
            if slot.told and (slot.told <= heard if heard is not None else not _may_come_twice(slot)):
                self._spool.drop(slot)
        news = None
        if heard is None:
            self._leave_out_ends(alive)
            news = iter(still_news([slot.data for slot in self._spool if slot.source is Source.EVENTS], alive))
        for slot in self._spool:
            slot.told = 0
        for slot in self._spool:
            data = next(news) if news is not None and slot.source is Source.EVENTS else slot.data
            if data:
                self.tell(slot, data)
            else:
                self._spool.drop(slot)

    def _leave_out_ends(self, alive: Container[int]) -> None:
        ends = [slot for slot in self._spool if _is_end(slot)]
        last = {_report(slot).pid: slot for slot in ends}
        for slot in ends:
            if _report(slot).pid in alive or last[_report(slot).pid] is not slot:
                self._spool.drop(slot)

    def close(self, reason: str) -> None:
        """End the link."""
        self._link.close(reason)


def _report(slot: Slot) -> Report:
    return Report.parse(slot.data)


def _may_come_twice(slot: Slot) -> bool:
    return slot.source is Source.EVENTS or _is_end(slot)


def _is_end(slot: Slot) -> bool:
    if slot.source is not Source.REPORT:
        return False
    report = _report(slot)
    return report.kind == Kind.CHILD and report.code in _ENDS


def _message(slot: Slot, data: bytes) -> Message:
    if slot.source is Source.EVENTS:
        return JobEvents(data)
    report = _report(slot)
    return JobReport(
        kind=int(report.kind),
        pid=report.pid,
        reporter=report.reporter,
        code=report.code,
        status=report.status,
        uid=report.uid,
        utime_us=report.utime_us,
        stime_us=report.stime_us,
        maxrss_kb=report.maxrss_kb,
        value=report.value,
        sender=report.sender,
    )
