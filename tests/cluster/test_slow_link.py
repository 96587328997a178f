"""Memory over a slow link: it is packed where that helps, and arrives as it was in any case."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from engine import packing
from tests.cluster.links import limited, sent
from tests.cluster.moving import move
from tests.cluster.virtual import VirtualCluster, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MB = 1 << 20
SIZE = 24 * MB
SPEED = "100mbit"

# So much memory, of lines or of noise; its digest when it is full, and another time when a line comes.
HOLDER = f"""
import hashlib, os, sys
line = b"%09d: what programs keep is mostly like this, and packs\\n"
noisy = sys.argv[1] == "noise"
data = bytearray(os.urandom({SIZE}) if noisy else b"".join(line % i for i in range({SIZE} // 57)))
print(hashlib.sha256(data).hexdigest(), flush=True)
sys.stdin.readline()
print(hashlib.sha256(data).hexdigest(), flush=True)
"""


@pytest.fixture(scope="module", params=["32M", "8M"], ids=["at once", "in rounds"])
def it(session_folder, request) -> Iterator[VirtualCluster]:
    with cluster(session_folder / "slow", "--netns", "--precopy", request.param, nodes=2) as made:
        try:
            with limited(made, 0, SPEED):
                pass
        except (subprocess.CalledProcessError, FileNotFoundError):
            pytest.skip("no tc, or a kernel without tbf (CONFIG_NET_SCH_TBF)")
        yield made


@contextmanager
def holding(what: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has filled its memory; it is as it was in the end."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, what], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            digest = process.stdout.readline()
            yield process
            out, _ = process.communicate("\n", timeout=60)
            assert out == digest and process.returncode == 0
        finally:
            process.kill()


@pytest.mark.skipif(not packing.works(), reason="no liblz4")
def test_memory_is_packed_on_a_slow_link(it):
    with holding("text") as process, limited(it, 0, SPEED):
        before = sent(it, 0)
        move(it, process.pid, 0)
        assert SIZE / 20 < sent(it, 0) - before < 0.8 * SIZE


def test_what_cannot_be_packed_goes_as_it_is(it):
    with holding("noise") as process:
        before = sent(it, 0)
        with limited(it, 0, "400mbit"):
            move(it, process.pid, 0)
        assert sent(it, 0) - before > 0.95 * SIZE
        move(it, process.pid, 1)
        move(it, process.pid, -1)
