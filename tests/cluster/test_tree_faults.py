"""All or none, exactly once: something breaks at every phase of every kind of move of a tree.

The suite takes a part of all cases, `BPFS_ROUNDS=1` all of them.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterable

import pytest

from tests.cluster.held import Interrupted, holding, kill_workers
from tests.cluster.moving import place, processes_of
from tests.cluster.ring import RING, check_ring, running
from tests.cluster.virtual import VirtualCluster, children, cluster, set_link, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("open_gates")]

NODES = 6
ROUTES = ("leave", "hop", "return")
EARLY = ("prepare", "freeze", "inspect", "attach", "transfer", "depart", "pledge")
LATE = ("agreed", "resume")  # there is no way back: none of the sources runs any more
# A slave that is killed again and again waits longer and longer before it starts afresh: take turns.
_turns = itertools.count()


def some(cases: Iterable[tuple[str, ...]], every: int) -> list[tuple[str, ...]]:
    """All of the cases, or some of each kind."""
    found = list(cases)
    return found if "BPFS_ROUNDS" in os.environ else found[:: min(every, len(found))]


def ends_of(route: str) -> tuple[int, int]:
    node = 2 * next(_turns) % NODES
    return {"leave": (-1, node), "hop": (node, node + 1), "return": (node, -1)}[route]


@pytest.fixture(scope="module")
def it(session_folder, gates):
    with holding(gates), cluster(session_folder / "treefaults", "--lease", "3", nodes=NODES) as made:
        yield made


@pytest.fixture
def ring():
    with running(sys.executable, "-c", RING) as process:
        yield process


def family_of(ring: subprocess.Popen[str]) -> list[int]:
    return [ring.pid, *children(ring.pid)[:2]]


def daemon(it: VirtualCluster, node: int) -> int:
    return it.pid("master") if node == -1 else it.slave(node)


def expect_all_at(it: VirtualCluster, ring: subprocess.Popen[str], family: list[int], where: int) -> None:
    wait_until(lambda: {place(it, pid) for pid in family} == {str(where)}, f"they should be at {where}")
    check_ring(it, ring, *family)


def expect_none(it: VirtualCluster, ring: subprocess.Popen[str], family: list[int]) -> None:
    assert ring.wait(60) == -signal.SIGKILL
    expect_nothing_left(it, family)


def expect_nothing_left(it: VirtualCluster, family: list[int]) -> None:
    for pid in family:
        wait_until(lambda pid=pid: not processes_of(it, pid), f"left over: {processes_of(it, pid)}")


@pytest.mark.parametrize(
    ("route", "side", "phase"), some(itertools.product(ROUTES, ("source", "destination"), EARLY + LATE), 5)
)
def test_engine_workers_die(it, gates, ring, route, side, phase):
    """Before all have agreed nothing has happened; afterwards all have moved, or, with the only copies, ended."""
    family = family_of(ring)
    held = Interrupted(it, gates, ring, ends_of(route), phase, "tree")
    kill_workers(daemon(it, getattr(held, side)))
    done = held.go_on()
    if phase in LATE and side == "destination":
        expect_none(it, ring, family)
        return
    assert (done == 0) == (phase in LATE), held.said + it.log("master")[-3000:]
    expect_all_at(it, ring, family, held.destination if done == 0 else held.source)


@pytest.mark.parametrize("route", ["hop", "return"])
def test_source_workers_die_after_a_kill(it, gates, ring, route):
    family = family_of(ring)
    held = Interrupted(it, gates, ring, ends_of(route), "vanish", "tree")
    kill_workers(daemon(it, held.source))
    assert held.go_on() == 0, held.said
    expect_all_at(it, ring, family, held.destination)


@pytest.mark.parametrize(("route", "phase"), some(itertools.product(("leave", "hop"), EARLY + LATE), 5))
def test_the_destination_dies(it, gates, ring, route, phase):
    family = family_of(ring)
    held = Interrupted(it, gates, ring, ends_of(route), phase, "tree")
    it.lose(held.destination)
    assert held.go_on() != 0
    if phase in LATE:
        expect_none(it, ring, family)
    else:
        expect_all_at(it, ring, family, held.source)
    it.wait_state(held.destination, "up")


@pytest.mark.parametrize(("route", "phase"), some(itertools.product(("hop", "return"), EARLY + LATE), 5))
def test_the_source_dies(it, gates, ring, route, phase):
    family = family_of(ring)
    held = Interrupted(it, gates, ring, ends_of(route), phase, "tree")
    it.lose(held.source)
    done = held.go_on()
    assert (done == 0) == (phase in LATE), held.said
    if done == 0:
        expect_all_at(it, ring, family, held.destination)
    else:
        expect_none(it, ring, family)
    it.wait_state(held.source, "up")


@pytest.mark.parametrize(
    ("route", "whose", "phase"), some(itertools.product(ROUTES, ("first", "child"), EARLY + LATE), 7)
)
def test_one_is_killed_meanwhile(it, gates, ring, route, whose, phase):
    """At home the process itself, else its ghost: it ends, the others live on together, wherever that is."""
    family = family_of(ring)
    held = Interrupted(it, gates, ring, ends_of(route), phase, "tree")
    killed = family[0 if whose == "first" else 1]
    os.kill(killed, signal.SIGKILL)
    done = held.go_on()
    rest = [pid for pid in family if pid != killed]
    places: set[str] = set()

    def together() -> bool:
        places.clear()
        places.update(place(it, pid) for pid in rest)
        return len(places) == 1 and "migrating" not in places

    wait_until(together, f"the others should be at one place: {places}")
    assert (str(held.destination) in places) == (done == 0 or phase in LATE) or phase in ("depart", "pledge"), held.said
    assert done == 0 or whose == "first" or phase not in LATE
    os.killpg(ring.pid, signal.SIGKILL)
    expect_none(it, ring, family)


@pytest.fixture(scope="module")
def wired(session_folder, gates):
    with holding(gates), cluster(session_folder / "treewired", "--lease", "3", "--netns", nodes=3) as made:
        yield made


# Ends of the route, and which node's cable is pulled.
CUTS = {"leave": (-1, 1, 1), "hop-there": (0, 1, 1), "hop-here": (0, 1, 0), "return": (0, -1, 0)}


@pytest.mark.parametrize(("cut", "phase"), some(itertools.product(CUTS, ("freeze", "transfer", "agreed")), 2))
def test_the_network_is_cut(wired, gates, ring, cut, phase):
    source, destination, node = CUTS[cut]
    family = family_of(ring)
    held = Interrupted(wired, gates, ring, (source, destination), phase, "tree")
    set_link(wired.leg(node), up=False)
    try:
        done = held.go_on()
    finally:
        set_link(wired.leg(node), up=True)
    # Whoever was alone on the node that is fenced ends with it.
    if node == (destination if phase in LATE else source):
        expect_none(wired, ring, family)
    else:
        assert (done == 0) == (phase in LATE), held.said
        expect_all_at(wired, ring, family, destination if done == 0 else source)
    wired.wait_state(node, "up")
