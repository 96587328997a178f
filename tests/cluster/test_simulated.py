"""bpsh, a real master and its ghosts, on more nodes than this machine could hold: the slaves are simulated."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.virtual import TOP, VirtualCluster, cluster, wait_until
from tests.nodes.simjobs import MORE, MORTAL, SHUT, SILENT, slaves

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

PATIENCE = 0.5  # seconds
COUNTS = (63, 64, 65, 128, 130)  # around the bits of a word, of two, and the nodes that a byte can count


@pytest.fixture(scope="module")
def it(session_folder: Path) -> Iterator[VirtualCluster]:
    patience = f"imagetree 32 {PATIENCE}"
    # On a link of their own: what is on the master's machine needs no tree.
    with (
        cluster(session_folder / "simulated", "--netns", "--config", patience, nodes=1) as made,
        slaves(made, max(COUNTS), beside=0),
    ):
        wait_until(lambda: made.read("status").count(" up ") == max(COUNTS) + MORE + 1, "all nodes are up")
        yield made


@pytest.mark.parametrize("count", COUNTS)
def test_one_order_for_many_nodes(it: VirtualCluster, count: int) -> None:
    run = subprocess.run(
        [str(TOP / "bpfs/bin/bpsh"), "-p", f"1-{count}", "true"], env={**os.environ, "BPFS": str(it.mount)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (max(rank & 0x7F for rank in range(count)), "")
    said = [line.split() for line in run.stdout.splitlines()]
    assert sorted((int(prefix[:-1]), int(node), int(rank)) for prefix, _, node, _, _, _, rank in said) == [
        (node, node, node - 1) for node in range(1, count + 1)
    ]
    assert len({pid for *_, pid, _, _ in said}) == count
    outcomes = [line.split() for line in it.read("procs/onexec").splitlines()[-count:]]
    assert {(int(pid), int(node)) for pid, node, outcome in outcomes if outcome == "ok"} == {
        (int(words[4]), int(words[2])) for words in said
    }
    wait_until(lambda: it.read("procs/onexec") and os.listdir(it.mount / "procs") == FIXED, "all have ended")


def test_a_node_that_is_lost_is_named_and_the_others_go_on(it: VirtualCluster) -> None:
    mortal = max(COUNTS) + MORTAL
    run = subprocess.run(
        [str(TOP / "bpfs/bin/bpsh"), "-p", f"1,{mortal},2", "true"], env={**os.environ, "BPFS": str(it.mount)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert run.returncode == 125
    assert sorted(line.split()[2] for line in run.stdout.splitlines()) == ["1", "2"]
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"{mortal}: bpfs: process ")
    assert f" cannot run on node {mortal}: node {mortal} was lost: " in line
    wait_until(lambda: it.state(mortal) == "up", "it is there again")


def test_nodes_that_hang_in_the_tree_cost_those_below_a_moment(it: VirtualCluster) -> None:
    # Each of the first 32 feeds 32: all others but two have their image from one of these two first.
    faulty, count = (max(COUNTS) + SILENT, max(COUNTS) + SHUT), 94
    start = time.monotonic()
    run = subprocess.run(
        [str(TOP / "bpfs/bin/bpsh"), "-p", f"{faulty[0]},{faulty[1]},1-{count}", "true"],
        env={**os.environ, "BPFS": str(it.mount)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (count + 1, "")
    assert sorted(int(line.split()[2]) for line in run.stdout.splitlines()) == sorted([*faulty, *range(1, count + 1)])
    assert time.monotonic() - start > PATIENCE, "nobody waited for the silent one: it was not asked"


FIXED = ["restart", "onexec"]
