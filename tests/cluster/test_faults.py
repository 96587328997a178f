"""Exactly once, always: something breaks at every phase of every kind of move, and one living copy is left.

Or none, where the node that held the only copy died: then its ghost has ended as if killed.
"""

from __future__ import annotations

import itertools
import signal
import subprocess
from contextlib import contextmanager

import pytest

from tests.cluster.held import Interrupted, holding, kill_workers
from tests.cluster.moving import check_counting, counting, echo, finish, place, processes_of
from tests.cluster.virtual import VirtualCluster, cluster, set_link, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("open_gates")]

PHASES = ["prepare", "precopy", "freeze", "inspect", "attach", "transfer", "depart", "resume"]
AHEAD = ("--precopy", "1M")  # the counter is large enough for that
NODES = 8
ROUTES = ("leave", "hop", "return")
# A slave that is killed again and again waits longer and longer before it starts afresh: take turns.
_turns = itertools.count()


def ends_of(route: str) -> tuple[int, int]:
    """Source and destination."""
    node = 2 * next(_turns) % NODES
    return {"leave": (-1, node), "hop": (node, node + 1), "return": (node, -1)}[route]


# From here on the source's copy is no longer needed, or the destination's is the only one.
LATE = ("depart", "resume")


@pytest.fixture(scope="module")
def it(session_folder, gates):
    with holding(gates), cluster(session_folder / "faults", "--lease", "3", *AHEAD, nodes=NODES) as made:
        yield made


@pytest.fixture
def counter():
    with counting() as process:
        yield process


def daemon(it: VirtualCluster, node: int) -> int:
    return it.pid("master") if node == -1 else it.slave(node)


def expect_one_copy(it: VirtualCluster, process: subprocess.Popen[str], where: int) -> None:
    wait_until(lambda: place(it, process.pid) == str(where), f"it should be at {where}, not {place(it, process.pid)}")
    lines = finish(process)
    check_counting(lines, process.pid)
    wait_until(lambda: not processes_of(it, process.pid), f"left over: {processes_of(it, process.pid)}")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_engine_workers_die(it, gates, counter, route, phase, side):
    move = Interrupted(it, gates, counter, ends_of(route), phase)
    kill_workers(daemon(it, getattr(move, side)))
    done = move.go_on()
    # Late and on the destination's side, the only copy may die with the worker that holds it.
    if side == "destination" and phase == "resume":
        assert counter.wait(60) == -signal.SIGKILL
        return
    expect_one_copy(it, counter, move.destination if done == 0 else move.source)


@pytest.mark.parametrize("route", ["hop", "return"])
def test_the_source_worker_dies_after_the_kill(it, gates, counter, route):
    move = Interrupted(it, gates, counter, ends_of(route), "vanish")
    kill_workers(daemon(it, move.source))
    assert move.go_on() == 0
    expect_one_copy(it, counter, move.destination)


# What the engines do by themselves: the copy is whole; the source has ended, which is not told yet; it is.
STRAIGHT = ["held", "go", "follow"]


@pytest.mark.parametrize("phase", STRAIGHT)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_engine_workers_die_by_themselves(it, gates, counter, route, phase, side):
    move = Interrupted(it, gates, counter, ends_of(route), phase)
    kill_workers(daemon(it, getattr(move, side)))
    done = move.go_on()
    if side == "destination" and phase != "held":
        assert counter.wait(60) == -signal.SIGKILL
        return
    assert (done == 0) == (phase != "held")
    expect_one_copy(it, counter, move.destination if done == 0 else move.source)


@pytest.mark.parametrize(
    "change", ["exec 9>&1", "exec 9>&1; sleep 1000 <&- >&- 2>&- 9>&- &", "echo -n another > /proc/$$/comm; exec 9>&1"]
)
@pytest.mark.parametrize("route", ["leave", "hop"])
def test_a_process_that_changes_at_the_last_moment_moves_all_the_same(it, gates, route, change):
    with changing(it, gates, route, change) as (move, shell):
        assert move.go_on() == 0, move.said
        assert place(it, shell.pid) == str(move.destination)
        shell.stdin.write("echo moved >&9; kill $! && wait $!; exit 3\n")
        shell.stdin.close()
        assert shell.stdout.read() == "moved\n"
        assert shell.wait(60) == 3


@pytest.mark.parametrize("route", ["leave", "hop"])
def test_a_process_that_cannot_move_since_the_last_moment_stays(it, gates, route):
    with changing(it, gates, route, "exec 9<>/dev/udp/127.0.0.1/9") as (move, shell):
        assert move.go_on() == 1
        assert "Operation not supported" in move.said
        assert place(it, shell.pid) == str(move.source)
        assert "UDP" in it.read(f"nodes/{move.destination}/migrate").splitlines()[-1]
        assert echo(it, f"{shell.pid} close", f"nodes/{move.destination}/migrate").returncode == 0
        shell.stdin.write("exit 3\n")
        shell.stdin.close()
        assert shell.wait(60) == 3


@contextmanager
def changing(it, gates, route, change):
    """A shell on its way, of whose change after the look at it nobody knows yet."""
    with subprocess.Popen(["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as shell:
        try:
            move = Interrupted(it, gates, shell, ends_of(route), "ahead")
            shell.stdin.write(f"{change}\necho changed\n")
            shell.stdin.flush()
            assert shell.stdout.readline() == "changed\n"
            yield move, shell
        finally:
            shell.kill()


@pytest.mark.parametrize("phase", STRAIGHT)
@pytest.mark.parametrize("route", ["leave", "hop"])
def test_the_destination_dies_meanwhile(it, gates, counter, route, phase):
    move = Interrupted(it, gates, counter, ends_of(route), phase)
    slave = it.slave(move.destination)
    kill_workers(slave, *it.vitals(move.destination))
    done = move.go_on()
    if phase == "held":
        assert done != 0
        expect_one_copy(it, counter, move.source)
    else:
        assert counter.wait(60) == -signal.SIGKILL
    it.wait_state(move.destination, "up")


@pytest.mark.parametrize("phase", STRAIGHT)
@pytest.mark.parametrize("route", ["hop", "return"])
def test_the_source_dies_meanwhile(it, gates, counter, route, phase):
    move = Interrupted(it, gates, counter, ends_of(route), phase)
    slave = it.slave(move.source)
    kill_workers(slave, *it.vitals(move.source))
    assert move.go_on() == 0, move.said
    expect_one_copy(it, counter, move.destination)
    it.wait_state(move.source, "up")


@pytest.mark.parametrize("phase", STRAIGHT)
@pytest.mark.parametrize("route", ROUTES)
def test_the_process_is_killed_meanwhile(it, gates, counter, route, phase):
    move = Interrupted(it, gates, counter, ends_of(route), phase)
    counter.kill()
    move.go_on()
    assert counter.wait(60) == -signal.SIGKILL
    wait_until(lambda: not processes_of(it, counter.pid), f"left over: {processes_of(it, counter.pid)}")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("route", ["leave", "hop"])
def test_the_destination_dies(it, gates, counter, route, phase):
    move = Interrupted(it, gates, counter, ends_of(route), phase)
    it.lose(move.destination)
    done = move.go_on()
    if phase in LATE and (done == 0 or counter.poll() is not None or phase == "resume"):
        assert counter.wait(60) == -signal.SIGKILL
    else:
        assert done != 0
        expect_one_copy(it, counter, move.source)
    it.wait_state(move.destination, "up")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("route", ["hop", "return"])
def test_the_source_dies(it, gates, counter, route, phase):
    move = Interrupted(it, gates, counter, ends_of(route), phase)
    it.lose(move.source)
    done = move.go_on()
    if phase in LATE:
        assert done == 0
        expect_one_copy(it, counter, move.destination)
    else:
        assert counter.wait(60) == -signal.SIGKILL
    it.wait_state(move.source, "up")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("route", ["hop", "return"])
def test_the_ghost_is_killed(it, gates, counter, route, phase):
    move = Interrupted(it, gates, counter, ends_of(route), phase)
    counter.kill()
    move.go_on()
    assert counter.wait(60) == -signal.SIGKILL
    wait_until(lambda: not processes_of(it, counter.pid), f"left over: {processes_of(it, counter.pid)}")


@pytest.fixture(scope="module")
def wired(session_folder, gates):
    with holding(gates), cluster(session_folder / "wired", "--lease", "3", "--netns", *AHEAD, nodes=3) as made:
        yield made


CUTS = [((-1, 1), 1), ((0, 1), 1), ((0, 1), 0), ((0, -1), 0)]


@pytest.mark.parametrize(
    ("route", "cut", "phase"),
    [(*cut, phase) for phase in ("transfer", "depart") for cut in CUTS] + [(*cut, "precopy") for cut in CUTS[::3]],
    ids=str,
)
def test_the_network_is_cut(wired, gates, counter, route, cut, phase):
    move = Interrupted(wired, gates, counter, route, phase)
    set_link(wired.leg(cut), up=False)
    try:
        done = move.go_on()
    finally:
        set_link(wired.leg(cut), up=True)
    only_copy_cut = phase not in LATE if cut == move.source else phase in LATE and done == 0
    if only_copy_cut:
        assert counter.wait(60) == -signal.SIGKILL
    else:
        assert (done == 0) == (cut == move.source)
        expect_one_copy(wired, counter, move.destination if done == 0 else move.source)
    wired.wait_state(cut, "up")


@pytest.mark.parametrize("phase", ["held", "go"])
def test_the_network_is_cut_meanwhile(wired, gates, counter, phase):
    """The word that the copy may run does not get through; the node, which is fenced, takes the only copy with it."""
    move = Interrupted(wired, gates, counter, (-1, 1), phase)
    set_link(wired.leg(1), up=False)
    try:
        move.go_on()
        wired.wait_state(1, "down")
    finally:
        set_link(wired.leg(1), up=True)
    assert counter.wait(60) == -signal.SIGKILL
    wired.wait_state(1, "up")
