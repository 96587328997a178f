"""The slave's side of the lease: heartbeats out, answers in, and the moment at which it must not hold jobs any
more."""

from __future__ import annotations

from contextlib import suppress

import trio

from bpfs.errors import LinkClosed
from bpfs.slave.keeper import Keeper
from bpfs.slave.line import Line
from bpfs.wire.link import now
from bpfs.wire.messages import Heartbeat, HeartbeatSeen, Welcome
from engine.jobspace import JobSpace

LAST_GRACE = 0.3
"""Seconds after the lease's end in which the supervisor should have killed this life; less than any margin of the
master's."""


class Lease:
    """Counts from when an answered heartbeat was *sent*: so the master, which counts from later, never gives up
    earlier."""

    def __init__(self, link: Line, welcome: Welcome, sent: float, keeper: Keeper) -> None:
        """Args:
        sent: when, by `now()`, we sent what the welcome answers.
        """
        self._link = link
        self._welcome = welcome
        self._keeper = keeper
        self._sent: dict[int, float] = {}
        self._count = 0
        self._space: JobSpace | None = None
        self._extend(sent)

    def hold(self, space: JobSpace) -> None:
        """These jobs are under it from now on, whatever becomes of this process and of its supervisor."""
        self._space = space
        self._tell()

    def renew(self, welcome: Welcome, sent: float) -> None:
        """Another master has said welcome to our jobs."""
        self._welcome = welcome
        self._sent.clear()
        self._extend(sent)

    def _extend(self, sent: float) -> None:
        self.end = sent + self._welcome.lease
        self._tell()

    def _tell(self) -> None:
        told = self._welcome
        # Jobs may outlive it where they are to run on.
        fence = 0.0 if told.onlost == "continue" else self.end
        self._keeper.note_lease(fence, self.end, told.node, told.onlost, told.onlost_after)
        if self._space is not None:
            with suppress(OSError):  # it has ended; or the next word reaches it
                self._space.end_by(fence + LAST_GRACE if fence else 0.0)

    def seen(self, message: HeartbeatSeen) -> None:
        """Handler: the master has answered."""
        sent = self._sent.pop(message.count, None)
        if sent is not None:
            self._sent = {count: when for count, when in self._sent.items() if count > message.count}
            self._extend(sent)
        self._link.taken(message.taken)

    async def run(self) -> None:
        """Send heartbeats; returns when the lease is over."""
        beat = now()
        while now() < self.end:
            if now() >= beat:
                self._count += 1
                self._sent[self._count] = now()
                with suppress(LinkClosed):
                    self._link.notify_nowait(Heartbeat(self._count))
                beat = now() + self._welcome.heartbeat
            await trio.sleep(max(0.0, min(beat, self.end) - now()))
