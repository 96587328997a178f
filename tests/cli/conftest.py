"""A directory of plain files in the formats of /bpfs: enough to check what commands print and write.

What the real tree answers is checked in tests/cluster.
"""

from __future__ import annotations

from pathlib import Path

import pytest

NODES = [
    (0, "up", "111", "root", "root", "10.0.0.1"),
    (1, "up", "111", "root", "root", "10.0.0.2"),
    (2, "up", "111", "root", "root", "10.0.0.3"),
    (3, "down", "111", "root", "root", ""),
    (4, "up", "111", "root", "root", "10.0.0.5"),
    (5, "unavailable", "110", "nobody", "nogroup", "10.0.0.6"),
    (7, "up", "111", "root", "root", "10.0.0.8"),
]


@pytest.fixture
def plain_tree(tmp_path: Path) -> Path:
    """The directory; nodes 0-5 and 7, processes 1234 (on node 2) and 1300 (on its way)."""
    top = tmp_path / "tree"
    rows = [(-1, "up", "111", "root", "root", "10.0.0.254"), *NODES]
    for number, state, mode, owner, group, address in rows:
        node = top / "nodes" / str(number)
        (node / "procs").mkdir(parents=True)
        texts = {"state": state, "mode": mode, "owner": owner, "group": group, "address": address}
        texts |= {"load": "0.25 0.50 1.00 2/345 6789", "reason": "" if state == "up" else "has not been seen yet"}
        texts |= {"memory": "total 1024\nfree 512", "cpus": "2", "uptime": "12.50", "kernel": "6.1.0", "migrate": ""}
        texts |= {"cache": "", "busy": "0.25\n1.00", "heard": "1700000000.25"}
        for name, text in texts.items():
            (node / name).write_text(f"{text}\n")
    (top / "status").write_text("".join(" ".join(map(str, row)).rstrip() + "\n" for row in NODES))
    (top / "libraries").touch()
    (top / "self").symlink_to("nodes/-1")
    (top / "master").symlink_to("nodes/-1")
    for pid, place in ((1234, "2"), (1300, "migrating")):
        process = top / "procs" / str(pid)
        process.mkdir(parents=True)
        texts = {"node": place, "state": "running", "wait": "exit 3", "cantmove": "", "signal": ""}
        texts["history"] = "-1 1700000000.000 0.0 0\n2 1700000001.000 2.5 1048576"
        for name, text in texts.items():
            (process / name).write_text(f"{text}\n")
        (process / "cmdline").write_bytes(b"sleep\x001000\x00")
    (top / "procs" / "restart").write_text("")
    (top / "nodes/2/procs/1234").symlink_to("../../../procs/1234")
    return top
