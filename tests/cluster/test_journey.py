"""Each victim goes from the master to a node, on to another, and home, and finds everything as it left it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.moving import echo, place
from tests.cluster.virtual import VirtualCluster, cluster
from tests.engine.moves import Victim, until
from tests.engine.test_descriptors import KINDS, SCRIPT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

VICTIMS = Path(__file__).parent.parent / "victims"
JOURNEY = (0, 1, -1)


@pytest.fixture(scope="module")
def it(session_folder: Path) -> Iterator[VirtualCluster]:
    subprocess.run(["make", "-s", "-C", str(VICTIMS)], check=True)
    with cluster(session_folder / "journey", nodes=2) as made:
        yield made


@pytest.mark.parametrize(
    "victim",
    ["memory", "memory-static", "signals", "state root", "shared", "shared many", "attributes", "births", "clocks",
     "threads 1", "threads 10", "threads 500"],
)  # fmt: skip
def test_there_and_on_and_home(it: VirtualCluster, tmp_path: Path, victim: str) -> None:
    name, *arguments = victim.split()
    # Nothing but what it should have: descriptors above its limits could not be put back without CAP_SYS_RESOURCE.
    one = Victim(VICTIMS / "bin" / name, tmp_path, *arguments, close_fds=True)
    try:
        for node in JOURNEY:
            done = echo(it, one.pid, f"nodes/{node}/migrate")
            assert done.returncode == 0, done.stderr + it.read(f"nodes/{node}/migrate") + one.text()
            assert place(it, one.pid) == str(node)
        one.stop()
        until(lambda: one.process.poll() is not None, "its end")
        assert one.process.returncode == 0, one.text()
    finally:
        one.close()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_descriptor_of_a_stopped_program(it: VirtualCluster, tmp_path: Path, kind: str) -> None:
    with (
        open(tmp_path / "log", "w+b") as log,
        subprocess.Popen(
            [sys.executable, str(SCRIPT), kind, str(tmp_path)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as process,
    ):
        try:
            os.waitpid(process.pid, os.WUNTRACED)
            for node in JOURNEY:
                done = echo(it, process.pid, f"nodes/{node}/migrate")
                assert done.returncode == 0, done.stderr + it.read(f"nodes/{node}/migrate")
                assert place(it, process.pid) == str(node)
            os.kill(process.pid, signal.SIGCONT)  # it has stayed stopped all the way
            assert process.wait(60) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
