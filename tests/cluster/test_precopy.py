"""Large processes move while they run: their memory goes ahead in rounds."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.linux import userfaultfd
from tests.cluster.moving import echo, place
from tests.cluster.virtual import VirtualCluster, cluster
from tests.engine.moves import Victim, until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(not userfaultfd.works(), reason="this kernel keeps no record of writes (userfaultfd WP_ASYNC)"),
]

VICTIMS = Path(__file__).parent.parent / "victims"
JOURNEY = (0, 1, -1)


@pytest.fixture(scope="module")
def it(session_folder: Path) -> Iterator[VirtualCluster]:
    subprocess.run(["make", "-s", "-C", str(VICTIMS)], check=True)
    with cluster(session_folder / "precopy", "--precopy", "1M", nodes=2) as made:
        yield made


def writer(folder: Path, *arguments: str) -> Victim:
    return Victim(VICTIMS / "bin" / "writer", folder, *arguments, close_fds=True)


@pytest.mark.parametrize("how", ["64 4", "16 4 churn", "16 4 churn threads"])
def test_a_process_that_writes_goes_there_and_on_and_home(it: VirtualCluster, tmp_path: Path, how: str) -> None:
    one = writer(tmp_path, *how.split())
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
