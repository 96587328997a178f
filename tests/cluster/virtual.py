"""Real clusters for tests: bpcluster as a user calls it, and what it takes to look at clusters and to break them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from bpfs.cli import virtualnet
from bpfs.rundir import RunDir, process_start

TOP = Path(__file__).parents[2]

_CRASH = re.compile(r"Traceback \(most recent|\[\w+\.py:\d+ \w+")  # Python's own, and that of bpfs.log

DEADLINE = 60.0
"""Seconds until a thing that takes moments is taken for broken; this is no measure of speed."""


def bpcluster(*args: str, mount: Path | str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs bpcluster to its end."""
    option = ["--mount", str(mount)] if mount is not None else []
    return subprocess.run(
        [sys.executable, "-m", "bpfs.cli.bpcluster", *args, *option],
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TOP), os.environ.get("PYTHONPATH", "")])},
        stdin=subprocess.DEVNULL,
    )


def wait_until(what: Callable[[], object], sentence: str) -> None:
    """Polls until `what()` is true."""
    end = time.monotonic() + DEADLINE
    while not what():
        assert time.monotonic() < end, f"{sentence}: not within {DEADLINE:g} s"
        time.sleep(0.01)


class VirtualCluster:
    """One running cluster."""

    def __init__(self, mount: Path) -> None:
        self.mount = mount
        self.rundir = RunDir(str(mount))

    def read(self, path: str) -> str:
        """A file of the tree."""
        return (self.mount / path).read_text()

    def write(self, path: str, text: str) -> None:
        """Writes a line to a file of the tree."""
        with open(self.mount / path, "w") as file:
            file.write(text + "\n")

    def state(self, number: int) -> str:
        """The state of a node."""
        return self.read(f"nodes/{number}/state").strip()

    def wait_state(self, number: int, state: str) -> None:
        """Waits until a node is in a state."""
        wait_until(lambda: self.state(number) == state, f"node {number} should become {state}")

    def pid(self, role: str) -> int:
        """The pid of `master`, or of the supervisor (pid 1) of node `n3`."""
        return self.rundir.recorded()[role].pid

    def slave(self, number: int) -> int:
        """The pid of a node's slave proper; 0 while there is none."""
        return next((pid for pid in children(self.pid(f"n{number}")) if comm(pid) == "bpslave"), 0)

    def inits(self, number: int) -> list[int]:
        """The pid 1 of a node's job space."""
        return [pid for pid in children(self.pid(f"n{number}")) if comm(pid) == "nodeinit"]

    def lose(self, number: int) -> None:
        """A node dies, and its slave has nothing to take up."""
        vitals = {pid: process_start(pid)[1] for pid in self.vitals(number)}
        os.kill(self.slave(number), signal.SIGSTOP)
        for one in vitals:
            kill(one)
        # Its end of the link is closed then.
        wait_until(lambda: not living(vitals), f"node {number} should be dead")

    def vitals(self, number: int) -> list[int]:
        """What all jobs of a node die with, and its slave. iorelay comes before them, whose ends it would tell."""
        kin = children(self.pid(f"n{number}"))
        return [pid for name in ("iorelay", "nodeinit", "bpslave") for pid in kin if comm(pid) == name]

    def leg(self, number: int) -> str:
        """A node's network interface on this side."""
        return f"{virtualnet.bridge_name(str(self.mount))}.{number}"

    def log(self, role: str) -> str:
        """The log of `master` or of a node, `n3`."""
        return (self.rundir.path / f"{role}.log").read_text()

    def open_logs(self) -> list[TextIO]:
        """All logs, open: what comes later can be read although the cluster is taken down."""
        return [open(path, errors="replace") for path in sorted(self.rundir.path.glob("*.log"))]

    def processes(self) -> dict[int, int]:
        """All daemons and whatever descends from them: pid -> start time."""
        found = {}
        todo = [recorded.pid for recorded in self.rundir.recorded().values() if recorded.alive]
        while todo:
            pid = todo.pop()
            found[pid] = process_start(pid)[1]
            todo += children(pid)
        return found


def crashes(logs: list[TextIO]) -> list[str]:
    """Lines of logs that tell of an exception which nobody foresaw; closes the files."""
    found = []
    for file in logs:
        with file:
            found += [f"{file.name}: {line.rstrip()}" for line in file if _CRASH.search(line)]
    return found


def children(pid: int) -> list[int]:
    """The children of a process."""
    try:
        return [
            int(word)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for word in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def comm(pid: int) -> str:
    """The name of a process."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def living(processes: dict[int, int]) -> list[int]:
    """Which of these processes still live."""
    return [
        pid
        for pid, started in processes.items()
        if process_start(pid)[1] == started and process_start(pid)[0] not in "ZX"
    ]


def kill(pid: int) -> None:
    """kill -9."""
    os.kill(pid, signal.SIGKILL)


def set_link(name: str, up: bool) -> None:
    """Plugs a network interface in or out."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        (index,) = ip.link_lookup(ifname=name)
        ip.link("set", index=index, state="up" if up else "down")


def left_behind(cluster: VirtualCluster, processes: dict[int, int]) -> list[str]:
    """What should have gone with a cluster and has not."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    made = [str(path) for path in (cluster.mount, cluster.rundir.programs, cluster.rundir.psview)]
    bridge = virtualnet.bridge_name(str(cluster.mount))
    found = [f"process {pid} {comm(pid)}" for pid in living(processes)]
    found += [f"mount {mount}" for mount in mounts if mount in made]
    found += [f"link {name}" for name in os.listdir("/sys/class/net") if name.startswith(bridge)]
    if cluster.rundir.path.exists():
        found.append(f"directory {cluster.rundir.path}")
    return found


@contextmanager
def cluster(mount: Path, *options: str, nodes: int = 2) -> Iterator[VirtualCluster]:
    """A cluster, up when the context begins, and gone without a trace when it ends."""
    made = bpcluster("up", "--nodes", str(nodes), *options, mount=mount)
    assert made.returncode == 0, made.stderr
    it = VirtualCluster(mount)
    processes = it.processes()
    try:
        yield it
    except BaseException:
        for path in sorted(it.rundir.path.glob("*.log")):
            print(f"--- {path.name}\n{path.read_text()}", file=sys.stderr)
        raise
    finally:
        processes |= it.processes()
        logs = it.open_logs()
        ended = bpcluster("down", mount=mount)
    assert ended.returncode == 0, ended.stderr
    found = left_behind(it, processes)
    # What went wrong in the last test of a module, or on the way down, nobody else would notice.
    found += crashes(logs)
    assert not found, "\n".join(found)
