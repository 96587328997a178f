# SPDX-License-Identifier: GPL-2.0-or-later
"""`PID tree`: how long processes of 1 MB that move together stand still, beside the move of one of them alone."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.frame import Row
from tests.benchmarks.subject import MB, Subject, last_move, stage
from tests.cluster.virtual import VirtualCluster

SIZES = (2, 4, 16, 64)  # processes: one, and its children
ROUNDS = {2: 12, 4: 12, 16: 8, 64: 4}
ROUTES = (("leave", 1), ("hop", 0), ("home", -1))


def rows() -> Iterator[Row]:
    """The table."""
    with stage() as (it, folder):
        alone = measure(it, folder, 1, 20)
        for size in SIZES:
            found = measure(it, folder, size, ROUNDS[size])
            for name, _ in ROUTES:
                for how, of in (("median", statistics.median), ("least", min)):
                    what = f"{size} processes, {name}, frozen, {how} of {ROUNDS[size]}"
                    yield Row(what, of(found[name]), "ms", of(alone[name]), "one alone")


def measure(it: VirtualCluster, folder: Path, size: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds in which they stood still, by route."""
    frozen = defaultdict(list)
    with Subject.running(it, folder / "subject", str(MB), str(size - 1)) as one:
        for turn in range(rounds + 1):  # the first of all does not count
            for name, node in ROUTES:
                one.move(node, "tree" if size > 1 else "")
                if turn:
                    frozen[name].append(figures(it, node, size))
    return frozen


def figures(it: VirtualCluster, node: int, size: int) -> float:
    """The longest of those that came last: they stand still from when the first of them is stopped."""
    if size == 1:
        return last_move(it, node)["freeze_ms"]
    lines = it.read(f"nodes/{node}/migrate").splitlines()[-size:]
    words = [dict(word.split("=") for word in line.split() if "=" in word) for line in lines]
    return max(float(found["freeze_ms"]) for found in words)
