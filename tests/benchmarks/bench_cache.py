# SPDX-License-Identifier: GPL-2.0-or-later
"""One python3 moved again and again: bytes and time, the node's cache cold, filled by a neighbour, and warm."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.frame import Row
from tests.benchmarks.subject import last_move
from tests.cluster.moving import counting, move
from tests.cluster.virtual import VirtualCluster, cluster

PYTHON = "/usr/bin/python3"
MOVES = 100
SHOWN = (1, 2, MOVES)


def cache(it: VirtualCluster, node: int) -> dict[str, int]:
    """nodes/N/cache"""
    return {key: int(number) for key, number in (line.split() for line in it.read(f"nodes/{node}/cache").splitlines())}


def moves(it: VirtualCluster, node: int, how: str) -> Iterator[Row]:
    """One process there and back, MOVES times."""
    with counting(PYTHON, "/tmp") as process:
        for count in range(1, MOVES + 1):
            before = cache(it, node)
            move(it, process.pid, node)
            if count in SHOWN:
                figures, after = last_move(it, node), cache(it, node)
                content = after["fetched_bytes"] - before["fetched_bytes"]
                near = after["peer_bytes"] - before["peer_bytes"]
                yield Row(f"{how}: move {count}", figures["total_ms"], "ms", figures["freeze_ms"], "stood still")
                note = f"of it memory; {near / 1e6:.2f} MB came from another node" if near else "of it memory"
                sent = figures["bytes"]
                yield Row(f"{how}: bytes of move {count}", (sent + content) / 1e6, "MB", sent / 1e6, note)
            move(it, process.pid, -1)


def rows() -> Iterator[Row]:
    """The table."""
    with (
        tempfile.TemporaryDirectory(prefix="bpfs-bench-") as folder,
        cluster(Path(folder) / "m", "--root", "empty", nodes=2) as it,
    ):
        yield from moves(it, 0, "cold")
        yield from moves(it, 1, "cold, a neighbour warm")
        yield from moves(it, 0, "warm")
