"""What happened in the cluster, in order: numbered events that readers wait for.

Events are posted from the trio thread only. Readers keep the number of the last event they saw; who falls behind by
more than `KEPT` events is told how many were lost.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import trio

KEPT = 4096
"""Events kept for slow readers: a 1,000-node start is about 2,000 events."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    Attributes:
        number: counts from 1 without gaps.
        time: seconds since the epoch.
        node: the node concerned (-1: master).
        text: ``node 7 state up`` or ``process 1234 node 7``; one line.
    """

    number: int
    time: float
    node: int
    text: str


class EventLog:
    """The events of one cluster."""

    def __init__(self) -> None:
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._waiters: set[trio.Event] = set()
        self._listeners: list[Callable[[Event], None]] = []
        self.last = 0
        """Number of the newest event; 0 when there was none yet."""

    def post(self, text: str, node: int) -> Event:
        """Enter an event and wake its waiters."""
        self.last += 1
        event = Event(self.last, time.time(), node, text)
        self._kept.append(event)
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            waiter.set()
        for listener in self._listeners:
            listener(event)
        return event

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Have a plain function called for every event, at once; the returned function ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def since(self, number: int) -> list[Event]:
        """The kept events after `number`, oldest first."""
        missing = min(self.last - number, len(self._kept))
        return [self._kept[index] for index in range(len(self._kept) - missing, len(self._kept))]

    def lost(self, number: int) -> int:
        """How many events after `number` are no longer kept."""
        return max(0, self.last - len(self._kept) - number)

    async def wait_since(self, number: int) -> list[Event]:
        """Like `since`, but wait until there is at least one."""
        while self.last <= number:
            await self.wait_change()
        return self.since(number)

    async def wait_change(self) -> None:
        """Wait for the next event, whatever it is."""
        waiter = trio.Event()
        self._waiters.add(waiter)
        try:
            await waiter.wait()
        finally:
            self._waiters.discard(waiter)
