"""More nodes than a 64-bit mask has bits, all of them real: one command on all, and all without their master."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from itertools import accumulate
from pathlib import Path

import pytest
import trio

from bpfs.errors import BpfsError
from bpfs.master.listener import open_port
from bpfs.slave.connect import FIRST_DELAY, GROWTH
from bpfs.wire.handshake import read_key
from tests.cluster.virtual import TOP, cluster
from tests.nodes.simslave import master

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NODES = 65
AWAY = 2.0  # seconds
# Within 2 s: the first, and what the shortest pauses leave room for (0.05, 0.08, 0.13 ... s).
MOST_ATTEMPTS = 1 + sum(total <= AWAY for total in accumulate(FIRST_DELAY * GROWTH**n / 2 for n in range(20)))


@pytest.mark.timeout(300)
def test_65_nodes(tmp_path: Path) -> None:
    with cluster(tmp_path / "m", nodes=NODES) as it:

        def bpsh(*words: str) -> str:
            run = subprocess.run(
                [str(TOP / "bpfs/bin/bpsh"), *words], input="line\n" * 10_000, text=True, capture_output=True,
                timeout=200, check=False, env={**os.environ, "BPFS": str(it.mount)},
            )  # fmt: skip
            assert (run.returncode, run.stderr) == (0, "")
            return run.stdout

        shown = bpsh("-a", "-p", "sh", "-c", "wc -l; uname -n")
        for number in range(NODES):
            lines = [line.split(": ")[1] for line in shown.splitlines() if line.startswith(f"{number:3}: ")]
            assert lines == ["10000", f"n{number}"]
        dashes = "-" * 15
        assert bpsh("-a", "-g", "wc", "-l") == f"{dashes}\n0-64 (65)\n{dashes}\n10000\n"

        port, key = int(it.rundir.read("port").split()[1]), read_key(it.rundir.key)
        os.kill(it.pid("master"), signal.SIGKILL)
        attempts = turn_away(port, AWAY)
        assert NODES <= attempts <= NODES * MOST_ATTEMPTS
        trio.run(see_all_again, port, key)


def turn_away(port: int, seconds: float) -> int:
    """Stands in the master's place, and says nothing to anybody; how many came within so many seconds."""
    deadline = time.monotonic() + 60
    while True:
        try:
            listener = open_port("127.0.0.1", port)
            break
        except BpfsError:  # the dead master's is not closed yet
            assert time.monotonic() < deadline
            time.sleep(0.01)
    came, end = 0, time.monotonic() + seconds
    with listener:
        while (left := end - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(TimeoutError):
                listener.accept()[0].close()
                came += 1
    return came


async def see_all_again(port: int, key: bytes) -> None:
    """Another master, at the same port: all come back to it."""
    async with master(port, key) as there:
        with trio.move_on_after(60):
            for number in range(NODES):
                await there.wait_state(number, "up")
        nodes = there.cluster.nodes
        states = {number: (node.state.value, node.reason) for number in range(NODES) if (node := nodes.find(number))}
        assert [states.get(number) for number in range(NODES) if states.get(number) != ("up", "")] == []
