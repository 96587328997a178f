# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines for readers that wait: what stands behind the `events` files.

A reader gets every line from the opening on. One that does not read keeps a bounded number of lines; what it then
misses is told in a line of its own, ``lost N``, and costs nobody else anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

import trio

BACKLOG = 4096
"""Lines kept for a reader that does not read: a minute of a busy cluster, a few hundred kB at most."""


class EventHub:
    """Publishes lines under topics; a subscription hears one topic, or all."""

    def __init__(self, backlog: int = BACKLOG) -> None:
        self._backlog = backlog
        self._readers: set[Subscription] = set()

    def publish(self, line: str, *topics: Hashable) -> None:
        """Tells a line (without its end) to all who listen to one of `topics`, or to everything. Never waits."""
        for reader in self._readers:
            if reader.topic is None or reader.topic in topics:
                reader.put(line)

    def subscribe(self, topic: Hashable | None = None) -> Subscription:
        """A stream of lines from now on; what a `follow` function returns."""
        reader = Subscription(topic, self._backlog, self._readers.discard)
        self._readers.add(reader)
        return reader


class Subscription:
    """One reader of an `EventHub`. Reads give all lines there are, or wait for the next."""

    def __init__(self, topic: Hashable | None, backlog: int, leave: Callable[[Subscription], None]) -> None:
        self.topic = topic
        self._lines: deque[str] = deque()
        self._backlog = backlog
        self._lost = 0
        self._leave = leave
        self._news = trio.Event()

    def put(self, line: str) -> None:
        """Appends a line; the oldest goes when there are too many."""
        if len(self._lines) >= self._backlog:
            self._lines.popleft()
            self._lost += 1
        self._lines.append(line)
        self._news.set()

    async def __anext__(self) -> str:
        await self._news.wait()
        self._news = trio.Event()
        text = "".join(f"{line}\n" for line in self._lines)
        if self._lost:
            text = f"lost {self._lost}\n{text}"
        self._lines.clear()
        self._lost = 0
        return text

    async def aclose(self) -> None:
        """Ends the subscription."""
        self._leave(self)
