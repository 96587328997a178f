"""What the boot server tells whoever started it: lines `KIND WORD...` on a descriptor."""

from __future__ import annotations

import enum
import os
import time


class Report(enum.Enum):
    """The kinds of lines, and their words."""

    ASKED = "asked"  # NODE MAC ADDRESS: RARP was answered
    NEW = "new"  # NODE MAC: an unknown machine was given this number
    UNKNOWN = "unknown"  # MAC COUNT TIME: it asked, and is no node
    PROGRESS = "progress"  # NODE WHAT PERCENT: of the kernel or image that it fetches
    LOG = "log"  # NODE SENTENCE
    READY = "ready"  # ADDRESS PORT: from now on it serves


AGAIN = 1.0
"""Seconds within which the same line is not told twice: a node that asks without end must not flood anybody."""
REMEMBERED = 1024


class Reporter:
    """Writes the lines; one that nobody takes is dropped, for the server must never wait."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._told: dict[str, float] = {}

    def tell(self, kind: Report, *words: object) -> None:
        """One line."""
        line = " ".join([kind.value, *map(str, words)]).replace("\n", " ")
        now = time.monotonic()
        if now - self._told.get(line, -AGAIN) < AGAIN:
            return
        if len(self._told) >= REMEMBERED:
            self._told.clear()
        self._told[line] = now
        try:
            os.write(self._fd, line.encode(errors="replace")[:4000] + b"\n")
        except (BlockingIOError, BrokenPipeError):
            pass
