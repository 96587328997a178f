"""What happened to each node, for people: the lines of nodes/N/log."""

from __future__ import annotations

import time
from collections import deque

from bpfs.nodes.events import Event

KEPT = 500
"""Lines a node; the oldest go first."""
LONGEST = 1000
"""Characters of a line."""


class NodeLog:
    """The logs of all nodes: their boot, their states, and what the steps of node_up printed."""

    def __init__(self) -> None:
        self._lines: dict[int, deque[str]] = {}

    def add(self, node: int, text: str) -> None:
        """One line, with the time before it; whatever cannot be printed becomes a question mark."""
        plain = "".join(c if c.isprintable() else " " if c == "\t" else "?" for c in text[:LONGEST])
        lines = self._lines.setdefault(node, deque(maxlen=KEPT))
        lines.append(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {plain}\n")

    def add_event(self, event: Event) -> None:
        """A listener of the event log: what is said of a node and its state."""
        head = f"node {event.node} "
        if event.text.startswith((head + "state", head + "reason", head + "fenced")):
            self.add(event.node, event.text.removeprefix(head))

    def text(self, node: int) -> str:
        """All lines of a node."""
        return "".join(self._lines.get(node, ()))
