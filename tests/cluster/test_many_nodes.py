"""One command on more nodes than a 64-bit mask has bits, all of them real."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster.virtual import TOP, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NODES = 65


@pytest.mark.timeout(300)
def test_65_nodes(tmp_path: Path) -> None:
    with cluster(tmp_path / "m", nodes=NODES) as it:

        def bpsh(*words: str) -> str:
            run = subprocess.run(
                [str(TOP / "bpfs/bin/bpsh"), *words], input="line\n" * 10_000, text=True, capture_output=True,
                timeout=200, check=False, env={**os.environ, "BPFS": str(it.mount)},
            )  # fmt: skip
            assert (run.returncode, run.stderr) == (0, "")
            return run.stdout

        shown = bpsh("-a", "-p", "sh", "-c", "wc -l; uname -n")
        for number in range(NODES):
            lines = [line.split(": ")[1] for line in shown.splitlines() if line.startswith(f"{number:3}: ")]
            assert lines == ["10000", f"n{number}"]
        dashes = "-" * 15
        assert bpsh("-a", "-g", "wc", "-l") == f"{dashes}\n0-64 (65)\n{dashes}\n10000\n"
