# SPDX-License-Identifier: GPL-2.0-or-later
"""What benchmarks share: a row of the table, and a way to measure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        what: was measured.
        value: in `unit`.
        unit: `us`, `ms`, `MB/s`, ...
        baseline: what it is compared with, in the same unit; 0: nothing.
        note: what that was.
    """

    what: str
    value: float
    unit: str
    baseline: float = 0.0
    note: str = ""


def seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """The median time of `work` over some rounds, after one that does not count."""
    work()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
