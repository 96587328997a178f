# SPDX-License-Identifier: GPL-2.0-or-later
"""Typing: a line goes through a terminal to a program, and its answer comes back: on a node, here, and by ssh."""

from __future__ import annotations

import os
import pty
import statistics
import subprocess
import time
import tty
from collections.abc import Iterator

from tests.benchmarks.frame import Row
from tests.benchmarks.sshd import sshd
from tests.benchmarks.subject import stage
from tests.cluster.virtual import TOP

ROUNDS = 200
BPSH = str(TOP / "bpfs" / "bin" / "bpsh")


ANSWER = ["sed", "-u", "s/^/=/"]


def typed(command: list[str], mount: str) -> list[float]:
    """Seconds from each line's last key until the answer of the program behind is on the terminal."""
    master, end = pty.openpty()
    tty.setraw(end)
    environment = {**os.environ, "BPFS": mount}
    process = subprocess.Popen(command, stdin=end, stdout=end, env=environment, start_new_session=True)
    os.close(end)
    taken = []
    try:
        for number in range(ROUNDS + 10):
            line, seen = f"line {number}\n".encode(), b""
            start = time.perf_counter()
            os.write(master, line)
            while b"=" + line.strip() not in seen or not seen.endswith(b"\n"):
                seen += os.read(master, 65536)
            taken.append(time.perf_counter() - start)
    finally:
        process.kill()
        process.wait()
        os.close(master)
    return taken[10:]


def rows() -> Iterator[Row]:
    """The table."""
    with stage() as (it, _), sshd() as words:
        mount = str(it.mount)
        here = typed(ANSWER, mount)
        kinds = {"bpsh 1 sed": [BPSH, "1", *ANSWER], "bpsh -T 1 sed": [BPSH, "-T", "1", *ANSWER]}
        if words:
            kinds["ssh -tt localhost sed"] = [*words[:-1], "-tt", "localhost", *ANSWER]
        for name, command in kinds.items():
            taken = typed(command, mount)
            for how, of in (("median", statistics.median), ("least", min)):
                yield Row(f"echo of {name}, {how} of {ROUNDS}", of(taken) * 1e3, "ms", of(here) * 1e3, "sed here")
