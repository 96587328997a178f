"""Links of virtual nodes with namespaces of their own: how much went over them, and how fast they are."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.virtual import VirtualCluster


def sent(it: VirtualCluster, node: int) -> int:
    """Bytes that went to a node."""
    return int(Path(f"/sys/class/net/{it.leg(node)}/statistics/tx_bytes").read_text())


@contextmanager
def limited(it: VirtualCluster, node: int, speed: str) -> Iterator[None]:
    """The link to a node has this speed, as tc(8) writes it."""
    shaper = f"dev {it.leg(node)} root"
    subprocess.run(f"tc qdisc add {shaper} tbf rate {speed} burst 256kb latency 20ms".split(), check=True)
    try:
        yield
    finally:
        subprocess.run(f"tc qdisc del {shaper}".split(), check=True)
