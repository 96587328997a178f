"""The pid of a process that was forked on a node is its alone, wherever it goes and whatever becomes of that node."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.virtual import VirtualCluster, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# Tells the pid of its child; then has as many come and go as a line says, and tells how many pids these had, and
# whether one was that in the line.
PARENT = """
import os, signal, sys
def fork():
    pid = os.fork()
    if not pid:
        os.closerange(0, 3)
        signal.pause()
    return pid
print(fork(), flush=True)
for line in sys.stdin:
    seen = set()
    count, asked = map(int, line.split())
    for _ in range(count):
        pid = os.fork()
        if not pid: os._exit(0)
        os.waitpid(pid, 0)
        seen.add(pid)
    print(len(seen), asked in seen, flush=True)
"""
BLOCK = 2048


@pytest.fixture(scope="module")
def it(session_folder: Path) -> Iterator[VirtualCluster]:
    with cluster(session_folder / "pids", nodes=2) as running:
        yield running


@contextmanager
def parent_on(it: VirtualCluster, node: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A parent on a node, and its child."""
    command = f'echo "$$ onexec" > {it.mount}/nodes/{node}/migrate; exec /usr/bin/python3 -c "$0"'
    with subprocess.Popen(
        ["sh", "-c", command, PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            wait_until(lambda: (it.mount / f"procs/{child}/node").exists(), "the child has no ghost")
            yield parent, child
        finally:
            subprocess.run(["kill", "-9", str(child), str(parent.pid)], check=False)
            # The block is small: the next one's child may have the same pid. Not every init waits at once.
            wait_until(lambda: not Path(f"/proc/{child}").exists(), "nobody has waited for the child's ghost")


def gives_away(parent: subprocess.Popen[str], pid: int) -> bool:
    """Has so many children come and go that the block is begun anew: whether one had this pid."""
    assert parent.stdin is not None and parent.stdout is not None
    parent.stdin.write(f"{BLOCK} {pid}\n")
    parent.stdin.flush()
    pids, found = parent.stdout.readline().split()
    assert int(pids) < BLOCK
    return found == "True"


def reserved(it: VirtualCluster, node: int) -> list[int]:
    """Pids of processes without a job on a node, nodeinit's clones."""
    (init,) = it.inits(node)
    found = []
    for folder in Path(f"/proc/{init}/root/proc").iterdir():
        if folder.name.isdigit() and folder.name != "1":
            try:
                found += [int(folder.name)] if (folder / "comm").read_text() == "nodeinit\n" else []
            except OSError:
                pass
    return found


@pytest.mark.parametrize("to", [-1, 1])
def test_a_pid_is_not_given_away_while_its_process_is_elsewhere(it: VirtualCluster, to: int) -> None:
    with parent_on(it, 0) as (parent, child):
        it.write(f"nodes/{to}/migrate", str(child))
        # The parent's own stand-in goes with it, so only what is kept for the pid is left.
        it.write("nodes/1/migrate", str(parent.pid))
        with parent_on(it, 0) as (other, _):
            assert not gives_away(other, child)
        wait_until(lambda: child in reserved(it, 0), f"{child} is not kept")
        assert it.read(f"procs/{child}/node").strip() == str(to)
        it.write("nodes/0/migrate", str(child))  # and there is room for it where it was
        assert it.read(f"procs/{child}/node").strip() == "0"


def test_a_node_that_starts_afresh_keeps_the_pids_of_who_lives_elsewhere(it: VirtualCluster) -> None:
    with parent_on(it, 0) as (parent, child):
        it.write("nodes/1/migrate", str(child))
        it.write("nodes/1/migrate", str(parent.pid))
        slave = it.slave(0)
        it.lose(0)
        wait_until(lambda: it.slave(0) not in (0, slave), "node 0 does not start afresh")
        it.wait_state(0, "up")
        with parent_on(it, 0) as (other, another):
            assert another != child
            assert not gives_away(other, child)
        assert child in reserved(it, 0)
        assert it.read(f"procs/{child}/node").strip() == "1"


def test_a_pid_is_free_again_when_its_process_has_ended(it: VirtualCluster) -> None:
    with parent_on(it, 0) as (parent, child):
        it.write("nodes/1/migrate", str(child))
        it.write("nodes/1/migrate", str(parent.pid))
        wait_until(lambda: child in reserved(it, 0), f"{child} is not kept")
    wait_until(lambda: child not in reserved(it, 0), f"{child} is kept for ever")
