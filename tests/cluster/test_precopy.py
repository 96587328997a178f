"""Large processes move while they run: their memory goes ahead in rounds."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.linux import procfs, userfaultfd
from tests.building import build_victims
from tests.cluster.held import Interrupted, holding, kill_workers
from tests.cluster.moving import check_counting, counting, echo, finish, place, processes_of
from tests.cluster.virtual import VirtualCluster, cluster, wait_until
from tests.engine.moves import Victim, until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(not userfaultfd.works(), reason="this kernel keeps no record of writes (userfaultfd WP_ASYNC)"),
    pytest.mark.usefixtures("open_gates"),
]

VICTIMS = Path(__file__).parent.parent / "victims"
JOURNEY = (0, 1, -1)
ROUTES = [(-1, 0), (0, 1), (1, -1)]


@pytest.fixture(scope="module")
def it(session_folder: Path, gates: Path) -> Iterator[VirtualCluster]:
    build_victims()
    with holding(gates), cluster(session_folder / "precopy", "--precopy", "1M", nodes=2) as made:
        yield made


@pytest.fixture
def counter() -> Iterator[subprocess.Popen[str]]:
    with counting() as process:
        yield process


def end(one: Victim) -> None:
    one.stop()
    until(lambda: one.process.poll() is not None, "its end")
    assert one.process.returncode == 0, one.text()


def is_watched(it: VirtualCluster, pid: int) -> bool:
    """Whether the process, wherever it is, has memory whose writes are recorded."""
    for line in processes_of(it, pid):
        vmas = procfs.parse_smaps(procfs.read(f"/proc/{line.split()[0]}/smaps"))
        if any("uw" in vma.flags for vma in vmas):
            return True
    return False


@pytest.mark.parametrize("how", ["48 4", "16 4 churn", "16 4 churn threads"])
def test_a_process_that_writes_goes_there_and_on_and_home(it: VirtualCluster, tmp_path: Path, how: str) -> None:
    one = Victim(VICTIMS / "bin" / "writer", tmp_path, *how.split(), close_fds=True)
    try:
        for node in JOURNEY:
            done = echo(it, one.pid, f"nodes/{node}/migrate")
            assert done.returncode == 0, done.stderr + it.read(f"nodes/{node}/migrate") + one.text()
            assert place(it, one.pid) == str(node)
        end(one)
    finally:
        one.close()


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_mappings_that_change_during_a_long_round(
    it: VirtualCluster, gates: Path, tmp_path: Path, route: tuple[int, int]
) -> None:
    one = Victim(VICTIMS / "bin" / "writer", tmp_path, "8", "4", "churn", close_fds=True)
    try:
        held = Interrupted(it, gates, one.process, route, "precopy")
        wait_until(lambda: re.match(r"migrating: round \d+, \d+ of \d+ MB", it.read(f"procs/{one.pid}/state")), "state")
        assert it.read(f"procs/{one.pid}/node") == f"{route[0]}\n"
        assert echo(it, one.pid, f"nodes/{1 - max(route)}/migrate").stderr.rstrip().endswith("resource busy")
        assert it.read(f"procs/{one.pid}/cantmove") == "it is moving already\n"
        assert "busy" in echo(it, tmp_path / "image", f"procs/{one.pid}/checkpoint").stderr
        assert held.go_on() == 0, held.said + one.text()
        assert place(it, one.pid) == str(route[1])
        end(one)
    finally:
        one.close()


def test_forks_during_the_rounds(it: VirtualCluster, tmp_path: Path) -> None:
    one = Victim(VICTIMS / "bin" / "writer", tmp_path, "8", "4", "churn", "forks", close_fds=True)
    try:
        done = echo(it, one.pid, "nodes/0/migrate")
        assert done.returncode == 0, done.stderr + it.read("nodes/0/migrate") + one.text()
        end(one)
    finally:
        one.close()


@pytest.mark.parametrize("phase", ["precopy", "transfer"])
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_cancel(
    it: VirtualCluster, gates: Path, counter: subprocess.Popen[str], route: tuple[int, int], phase: str
) -> None:
    held = Interrupted(it, gates, counter, route, phase)
    assert is_watched(it, counter.pid)
    assert echo(it, "cancel", f"procs/{counter.pid}/node").returncode == 0
    assert held.finish() != 0
    assert "canceled" in held.said
    assert "ECANCELED" in it.read(f"nodes/{route[1]}/migrate").splitlines()[-1]
    assert place(it, counter.pid) == str(route[0])
    wait_until(lambda: not is_watched(it, counter.pid), "nothing should be recorded any more")
    again = echo(it, "cancel", f"procs/{counter.pid}/node")
    assert again.returncode != 0
    assert "No such process" in again.stderr
    check_counting(finish(counter), counter.pid)


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_a_ghost_or_node_keeps_nothing_when_the_destination_dies(
    it: VirtualCluster, gates: Path, counter: subprocess.Popen[str], route: tuple[int, int]
) -> None:
    held = Interrupted(it, gates, counter, route, "precopy")
    kill_workers(it.pid("master") if route[1] == -1 else it.slave(route[1]))
    assert held.go_on() != 0
    assert place(it, counter.pid) == str(route[0])
    wait_until(lambda: not is_watched(it, counter.pid), "nothing should be recorded any more")
    if route[1] == -1:  # its ghost is the process with its very pid here
        wait_until(lambda: procfs.own_bytes(counter.pid) < 1 << 20, "the ghost should give the memory back")
    check_counting(finish(counter), counter.pid)


# Becomes another program when it is told to, which ends with 5 on the next line.
SUCCESSOR = "import sys; print('new', flush=True); sys.stdin.readline(); sys.exit(5)"
EXECS = "import os, sys; os.read(0, 1); os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"


@pytest.fixture
def changeling() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", EXECS, SUCCESSOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: procfs.own_bytes(process.pid) > 2 << 20, "it should have begun")
    yield process
    process.kill()
    process.communicate()


def tell(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.flush()


@pytest.mark.parametrize("route", ROUTES[:2], ids=str)
def test_another_program_during_the_rounds(
    it: VirtualCluster, gates: Path, changeling: subprocess.Popen[str], route: tuple[int, int]
) -> None:
    held = Interrupted(it, gates, changeling, route, "precopy")
    tell(changeling, "x")
    assert changeling.stdout is not None
    assert changeling.stdout.readline() == "new\n"
    assert held.go_on() == 0, held.said
    assert place(it, changeling.pid) == str(route[1])
    tell(changeling, "\n")
    assert changeling.wait(60) == 5


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_an_end_during_the_rounds(
    it: VirtualCluster, gates: Path, counter: subprocess.Popen[str], route: tuple[int, int]
) -> None:
    held = Interrupted(it, gates, counter, route, "precopy")
    lines = finish(counter)  # before the move goes on: nothing is kept back
    check_counting(lines, counter.pid)
    assert held.go_on() != 0
    assert "No such process" in held.said
    wait_until(lambda: not processes_of(it, counter.pid), "nothing of it should be left")


def test_signals_during_the_rounds(it: VirtualCluster, gates: Path, counter: subprocess.Popen[str]) -> None:
    held = Interrupted(it, gates, counter, (0, 1), "precopy")
    counter.send_signal(signal.SIGTERM)
    assert counter.wait(60) == -signal.SIGTERM
    assert held.go_on() != 0
