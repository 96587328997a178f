# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves over links of several speeds, with memory that packs and memory that does not: as configured, beside `off`."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from tests.benchmarks.frame import Row
from tests.benchmarks.subject import last_move
from tests.cluster.links import limited, sent
from tests.cluster.moving import move
from tests.cluster.test_slow_link import holding
from tests.cluster.virtual import VirtualCluster, cluster

LINKS = ("100mbit", "1gbit", "")
KINDS = ("text", "noise")
ROUNDS = 7


def measure(it: VirtualCluster, kind: str, speed: str) -> tuple[float, float]:
    """ms of one move to node 0, and bytes that went over its link."""
    with holding(kind) as process:
        before = sent(it, 0)
        with limited(it, 0, speed) if speed else nullcontext():
            move(it, process.pid, 0)
        return last_move(it, 0)["total_ms"], sent(it, 0) - before


def rows() -> Iterator[Row]:
    """The table: medians, in turns."""
    options = ("--netns", "--precopy", "off", "--config")
    with (
        tempfile.TemporaryDirectory(prefix="bpfs-bench-") as folder,
        cluster(Path(folder) / "off", *options, "compress off", nodes=1) as plain,
        cluster(Path(folder) / "auto", *options, "compress auto", nodes=1) as auto,
    ):
        for kind in KINDS:
            for speed in LINKS:
                pairs = [(measure(plain, kind, speed), measure(auto, kind, speed)) for _ in range(ROUNDS)]
                (before, whole), (ms, carried) = (
                    [statistics.median(found) for found in zip(*side, strict=True)] for side in zip(*pairs, strict=True)
                )
                yield Row(f"{kind} of 24 MB over {speed or 'veth'}", ms, "ms", before, "off")
                yield Row("… bytes on the link", carried / 1e6, "MB", whole / 1e6, "off")
