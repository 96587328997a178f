"""A parent and one or two children, each on the master, node 0, 1 or 2, moved before or after the fork: whatever
relatives do to each other is as on one machine. tests/victims/placed.c does and checks it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.building import build_victims
from tests.cluster.moving import move
from tests.cluster.virtual import VirtualCluster, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MASTER = -1
ALL = (MASTER, 0, 1, 2)
AT_ONCE = 4
VICTIM = Path(__file__).parents[1] / "victims/bin/placed"

Arrangement = tuple[str, int, tuple[int, ...]]
"""When the parent moves, where it is then, and where its children are."""


def arrangements(every: bool) -> Iterator[Arrangement]:
    """Each arrangement, or without `every` one of those that differ by the numbers of nodes only."""
    for when, parent, count in itertools.product(("before fork", "after fork"), ALL, (1, 2)):
        for children in itertools.product(ALL, repeat=count):
            met = list(dict.fromkeys(node for node in (parent, *children) if node != MASTER))
            if every or met == sorted(met) == list(range(len(met))):
                yield when, parent, children


@pytest.fixture(scope="module")
def it(session_folder: Path) -> Iterator[VirtualCluster]:
    build_victims()
    with cluster(session_folder / "placements", nodes=3) as made:
        yield made


def fork(process: subprocess.Popen[str], count: int) -> list[int]:
    assert process.stdin and process.stdout
    print(f"fork {count}", file=process.stdin, flush=True)
    return [int(word) for word in process.stdout.readline().split()]


def arrange(it: VirtualCluster, process: subprocess.Popen[str], arrangement: Arrangement) -> list[int]:
    when, parent, places = arrangement
    if when == "before fork":
        place(it, process.pid, parent)
        children = fork(process, len(places))
        for child in children:
            wait_until(lambda pid=child: (it.mount / f"procs/{pid}/node").exists(), f"{child} should show")
    else:
        children = fork(process, len(places))
        place(it, process.pid, parent)
    for child, node in zip(children, places, strict=True):
        place(it, child, node)
    return children


def place(it: VirtualCluster, pid: int, node: int) -> None:
    if it.read(f"procs/{pid}/node") != f"{node}\n":
        move(it, pid, node)


def faults(it: VirtualCluster, arrangement: Arrangement) -> list[str]:
    """What is not as on one machine."""
    process = subprocess.Popen(
        [VICTIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    children: list[int] = []
    try:
        children = arrange(it, process, arrangement)
        out, err = process.communicate("check\n", timeout=100)
    except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
        return [f"{arrangement}: {type(error).__name__}: {error}"]
    finally:
        for pid in (process.pid, *children):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
    lines = out.splitlines()
    found = [line for line in (*lines, *err.splitlines()) if not line.startswith("used ") and line != "done"]
    if lines[-1:] != ["done"] or process.returncode:
        found.append(f"ended with {process.returncode} after {lines[-1:]}")
    _, parent, places = arrangement
    used = [int(line.split()[1]) for line in lines if line.startswith("used ")]
    if places[0] == parent and (not used or used[0] < 50_000):
        found.append(f"processor time of a child in the same place: {used} us")
    return [f"{arrangement}: {line}" for line in found]


@pytest.mark.timeout(400)
def test_relatives_everywhere(it: VirtualCluster) -> None:
    todo: Sequence[Arrangement] = list(arrangements("BPFS_ROUNDS" in os.environ))
    assert len(todo) >= 40
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = [line for lines in pool.map(lambda one: faults(it, one), todo) for line in lines]
    assert not found, "\n".join(found)
    wait_until(lambda: it.read("status") and not list((it.mount / "procs").glob("[0-9]*")), "nothing should be left")
