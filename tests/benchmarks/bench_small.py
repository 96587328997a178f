# SPDX-License-Identifier: GPL-2.0-or-later
"""The move of a process with 1 MB of memory, as seen by the write that asks for it."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator

from tests.benchmarks.frame import Row
from tests.benchmarks.sshd import sshd
from tests.benchmarks.subject import MB, into_fresh_memory, last_move, other_process, stage, subject, tcp_copy

ROUNDS = 40
ROUTES = (("master to node", 1), ("node to node", 0), ("home", -1))


def over_ssh() -> list[float] | None:
    """Seconds of ``ssh localhost true``, where there is an sshd to be had."""
    taken = []
    with sshd() as words:
        for _ in range(ROUNDS // 4 + 1 if words else 0):
            start = time.perf_counter()
            subprocess.run([*words, "true"], check=True)
            taken.append(time.perf_counter() - start)
    return taken[1:] or None


def rows() -> Iterator[Row]:
    """The table."""
    total, freeze, copy, size = defaultdict(list), defaultdict(list), [], MB
    with stage() as (it, folder), subject(it, folder, MB) as one, other_process(into_fresh_memory) as port:
        for _, node in ROUTES:
            one.move(node)  # the first of all does not count
        for _ in range(ROUNDS):
            for name, node in ROUTES:
                total[name].append(one.move(node))
                figures = last_move(it, node)
                freeze[name].append(figures["freeze_ms"])
                size = int(figures["bytes"])
            copy.append(tcp_copy(port, memoryview(bytes(size))))
    compared = over_ssh()
    note = "ssh localhost true" if compared else f"its {size:,} bytes by plain TCP"
    base = compared or copy
    for name, _ in ROUTES:
        for how, of in (("median", statistics.median), ("least", min)):
            yield Row(f"{name}, the write, {how} of {ROUNDS}", of(total[name]) * 1e3, "ms", of(base) * 1e3, note)
            yield Row(f"{name}, frozen, {how} of {ROUNDS}", of(freeze[name]), "ms", of(base) * 1e3, note)
