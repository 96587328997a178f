"""Images on their way down a tree of real nodes, one of which hangs or is cut off; and nodes that do not answer."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.moving import echo
from tests.cluster.virtual import TOP, VirtualCluster, cluster, set_link, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

BPSH = str(TOP / "bpfs" / "bin" / "bpsh")
NODES = 7  # of which node 0 feeds 2 and 3, and node 1 feeds 4 and 5; 6 is below 2


@pytest.fixture(scope="module")
def it(session_folder: Path) -> Iterator[VirtualCluster]:
    with cluster(session_folder / "images", "--netns", "--config", "imagetree 2 0.5", nodes=NODES) as made:
        yield made


@contextmanager
def stopped(it: VirtualCluster, node: int) -> Iterator[None]:
    slave = it.slave(node)
    os.kill(slave, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(slave, signal.SIGCONT)


@contextmanager
def cut(it: VirtualCluster, node: int) -> Iterator[None]:
    set_link(it.leg(node), up=False)
    try:
        yield
    finally:
        set_link(it.leg(node), up=True)


@pytest.mark.parametrize("broken", [stopped, cut])
def test_below_a_node_that_hangs_all_have_the_image_all_the_same(
    it: VirtualCluster, broken: Callable[..., object], tmp_path: Path
) -> None:
    said, seen = tmp_path / "said", len(it.log("n2"))
    with said.open("wb") as out:
        with broken(it, 0):
            run = subprocess.Popen(
                [BPSH, "-L", f"0-{NODES - 1}", "uname", "-n"], env={**os.environ, "BPFS": str(it.mount)},
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            others = {f"n{node}" for node in range(1, NODES)}
            wait_until(lambda: set(said.read_text().split()) == others, "all others have run it")
            assert run.poll() is None
        assert (run.communicate(timeout=60)[1], run.returncode) == ("", 0)
    assert said.read_text().split().count("n0") == 1
    address = it.read("nodes/0/address").strip()
    assert f"no image from {address}: silent for 0.5 s; the next one is asked" in it.log("n2")[seen:]
    assert "the next one is asked" not in it.log("n4")


def test_many_processes_of_a_node_share_one_image(it: VirtualCluster) -> None:
    spec = ",".join(str(node) for node in range(2) for _ in range(8))
    run = subprocess.run(
        [BPSH, spec, "sh", "-c", "echo $BPROC_RANK $(uname -n)"], env={**os.environ, "BPFS": str(it.mount)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert sorted(run.stdout.splitlines()) == sorted(f"{rank} n{rank // 8}" for rank in range(16))


def test_a_node_that_does_not_answer_fails_in_time(session_folder: Path) -> None:
    with (
        cluster(session_folder / "timeout", "--config", "nodetimeout 0.3", nodes=1) as it,
        subprocess.Popen(["sleep", "1000"]) as process,
    ):
        try:
            with stopped(it, 0):
                refused = echo(it, process.pid, "nodes/0/migrate")
                assert "Connection timed out" in refused.stderr
                assert "did not answer within 0.3 s" in it.read("nodes/0/migrate")
                assert (
                    not (it.mount / "procs" / str(process.pid)).exists()
                    or it.read(f"procs/{process.pid}/node") == "-1\n"
                )
        finally:
            process.kill()
