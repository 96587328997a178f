"""The quickstart as a user runs it: from anywhere, twice."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster.virtual import TOP, VirtualCluster, bpcluster, left_behind

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def quickstart(folder: Path, mount: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(TOP / "mountscripts" / "quickstart"), "--no-links", "--mount", str(mount)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )


@pytest.mark.timeout(600)
def test_quickstart_twice(tmp_path: Path) -> None:
    it = VirtualCluster(tmp_path / "m")
    processes: dict[int, int] = {}
    try:
        first = quickstart(tmp_path, it.mount)
        processes = it.processes()
        assert first.returncode == 0, first.stdout + first.stderr
        assert "the same, bit for bit" in first.stdout
        assert "a cluster is running" not in first.stdout
        second = quickstart(Path("/"), it.mount)
        assert second.returncode == 0, second.stdout + second.stderr
        assert f"a cluster is running at {it.mount} already" in second.stdout
        assert "the same, bit for bit" in second.stdout
    finally:
        bpcluster("down", mount=it.mount)
    assert left_behind(it, processes) == []
