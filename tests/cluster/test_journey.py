"""Each victim goes from the master to a node, on to another, and home, and finds everything as it left it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.moving import echo, place
from tests.cluster.virtual import VirtualCluster, cluster
from tests.engine.moves import Victim, until

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
