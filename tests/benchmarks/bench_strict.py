# SPDX-License-Identifier: GPL-2.0-or-later
"""What it costs a job to be strict, beside the same job on the same node that is not; and that nobody else pays."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.benchmarks.bench_forks import CALLS
from tests.benchmarks.frame import Row
from tests.benchmarks.subject import Subject, stage

ROUNDS = 7
LAX, STRICT, HOME = "", " strict", "home"


def rows() -> Iterator[Row]:
    """The table."""
    with stage() as (it, folder), ExitStack() as stack:
        program = folder / "forks"
        subprocess.run(["gcc", "-O2", "-o", program, Path(__file__).with_name("forks.c")], check=True)
        others = [stack.enter_context(Subject.running(it, folder / "subject", "0")).pid for _ in range(2)]
        (it.mount / "nodes/1/migrate").write_text(f"{others[1]}\n")

        def run(how: str, *arguments: object) -> list[float]:
            command = [str(program), *map(str, arguments)]
            if how != HOME:
                order = f'echo "$$ onexec{how}" > {it.mount}/nodes/0/migrate; exec "$@"'
                command = ["sh", "-c", order, "sh", *command]
            done = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, check=True)
            return [float(word) for word in done.stdout.split()]

        calls: dict[str, list[list[float]]] = {HOME: [], LAX: [], STRICT: []}
        for _ in range(ROUNDS):
            for how, found in calls.items():
                found.append(run(how, "calls"))
        note = f"a job that is not strict; least of {ROUNDS}"
        for index, name in enumerate(CALLS):
            least = {how: min(one[index] for one in found) / 1e3 for how, found in calls.items()}
            yield Row(name, least[STRICT], "us", least[LAX], note)
            yield Row("  … not strict, beside a strict one", least[LAX], "us", least[HOME], "on the master")
        own = {how: min(run(how, "signals")[0] for _ in range(ROUNDS)) / 1e3 for how in (LAX, STRICT)}
        yield Row("kill of itself", own[STRICT], "us", own[LAX], note)
        found = [run(STRICT, "signals", *others) for _ in range(ROUNDS)]
        for index, name in ((1, "on the master"), (2, "on another node")):
            yield Row(f"kill of a process {name}", min(one[index] for one in found) / 1e3, "us")
