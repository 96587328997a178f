# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast a process runs that has been moved, beside itself on the master before and after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from tests.benchmarks.frame import Row
from tests.benchmarks.subject import MB, stage, subject

STAYS = 8
PIECES = 8
WORKS = {"c": "computes", "s": "makes system calls"}


def rows() -> Iterator[Row]:
    """The table."""
    taken: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    with stage() as (it, folder), subject(it, folder, MB) as one:
        for _ in range(STAYS):
            for node in (-1, 1):
                one.move(node)
                for work in WORKS:
                    taken[work, node] += [one.work(work) for _ in range(PIECES)]
    note = f"on the master; least of {STAYS * PIECES}"
    for work, name in WORKS.items():
        for index, kind in enumerate(("time", "processor time")):
            there, here = (min(pair[index] for pair in taken[work, node]) for node in (1, -1))
            yield Row(f"a loop that {name}, {kind}", there * 1e3, "ms", here * 1e3, note)
