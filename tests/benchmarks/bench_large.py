# SPDX-License-Identifier: GPL-2.0-or-later
"""The move of a process with 1 GB of memory, beside plain TCP into fresh memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from tests.benchmarks.frame import Row
from tests.benchmarks.subject import MB, into_fresh_memory, last_move, other_process, stage, subject, tcp_copy

SIZE = 1024 * MB
ROUNDS = 3


def rows() -> Iterator[Row]:
    """The table."""
    moves: list[float] = []
    frozen: list[float] = []
    copies: list[float] = []
    with stage() as (it, folder), other_process(into_fresh_memory) as port, mmap.mmap(-1, SIZE) as memory:
        for start in range(0, SIZE, 4096):
            memory[start] = 1
        for _ in range(ROUNDS):
            with subject(it, folder, SIZE) as one:
                moves.append(one.move(1))
                frozen.append(last_move(it, 1)["freeze_ms"])
            with memoryview(memory) as view:
                copies.append(tcp_copy(port, view))
    rate, plain = SIZE / min(moves) / 1e6, SIZE / min(copies) / 1e6
    yield Row(f"move of 1 GB, the write, least of {ROUNDS}", min(moves) * 1e3, "ms", min(copies) * 1e3, "plain TCP")
    yield Row(f"move of 1 GB, frozen, least of {ROUNDS}", min(frozen), "ms", min(copies) * 1e3, "plain TCP")
    yield Row("rate of the move", rate, "MB/s", plain, "plain TCP into fresh memory")
