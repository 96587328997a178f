"""A thousand moves of one process there and back: nothing of the cluster grows, and the process counts on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.building import build_victims
from tests.cluster.virtual import VirtualCluster, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

MOVES = 1000
MEMORY_KB = 2048
"""What allocators of a dozen Python processes may differ by; 2 kB lost a move would be seen."""


@pytest.fixture(scope="module")
def it(session_folder: Path) -> Iterator[VirtualCluster]:
    with cluster(session_folder / "thousand", nodes=1) as made:
        yield made


@pytest.fixture(scope="module")
def program() -> Path:
    return build_victims() / "memory-static"


def held(it: VirtualCluster, pid: int) -> dict[str, int]:
    """What all daemons, workers, relays and inits hold, and the process: descriptors, processes, mappings, memory."""
    daemons = it.processes()
    found = {"processes": len(daemons), "descriptors": 0, "kB": 0, "own descriptors": 0, "own mappings": 0}
    for one in daemons:
        try:
            found["descriptors"] += len(os.listdir(f"/proc/{one}/fd"))
            found["kB"] += pss(one)
        except (FileNotFoundError, ProcessLookupError):
            found["processes"] -= 1  # a worker that has just done its work
    found["own descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
    found["own mappings"] = Path(f"/proc/{pid}/maps").read_text().count("\n")
    return found


def pss(pid: int) -> int:
    """Memory of a process in kB, shared pages by their share."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("\nPss:", 1)[1].split()[0])


def test_a_thousand_moves_there_and_back_leave_no_growth(it: VirtualCluster, program: Path, tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    process = subprocess.Popen([program, stop], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: Path(f"{stop}.ready").exists(), "the program should be ready")
    there, home = (os.open(it.mount / f"nodes/{node}/migrate", os.O_WRONLY) for node in (0, -1))
    line = b"%d\n" % process.pid

    def go(times: int) -> None:
        for turn in range(times):
            for node, file in ((0, there), (-1, home)):
                try:
                    os.write(file, line)
                except OSError as error:
                    why = it.read(f"nodes/{node}/migrate") + it.log("master") + it.log("n0")
                    raise AssertionError(f"move {turn} to node {node}: {error}: {why}") from error

    try:
        go(50)  # caches fill, spare workers are made
        before = held(it, process.pid)
        go(MOVES)

        def grown() -> dict[str, int]:
            now = held(it, process.pid)
            return {key: now[key] - before[key] for key in before}

        # Each of the two daemons makes its next spare worker a moment after a move, and streams are closed in the
        # background.
        allowed = {"processes": 2, "descriptors": 4, "kB": MEMORY_KB, "own descriptors": 0, "own mappings": 0}
        wait_until(
            lambda: all(grown()[key] <= allowed[key] for key in allowed), f"after {MOVES} moves, it grew: {grown()}"
        )
        assert len(it.read(f"procs/{process.pid}/history").splitlines()) <= 64
        stop.touch()
        assert process.wait(60) == 0, process.communicate()[1]
    finally:
        os.close(there)
        os.close(home)
        process.kill()
        process.communicate()
