"""Moves that stand still at a phase, for something to happen there: bpfs/procs/faults.py."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.linux import procfs
from tests.cluster.moving import echo
from tests.cluster.virtual import VirtualCluster, children, comm, wait_until


@contextmanager
def holding(gates: Path) -> Iterator[None]:
    """Clusters that are started in this context hold their moves at these gates; a module may have others as well."""
    os.environ["BPFS_HOLD"] = str(gates)
    try:
        yield
    finally:
        os.environ.pop("BPFS_HOLD", None)


def kill_workers(daemon: int, *others: int) -> None:
    """kill -9 of all engine workers of a daemon, and of these processes; they are dead afterwards."""
    workers = [one for zygote in children(daemon) if comm(zygote) == "bpfs-zygote" for one in children(zygote)]
    for one in [*others, *workers]:
        os.kill(one, signal.SIGKILL)
    for one in workers:
        wait_until(lambda one=one: procfs.has_ended(f"/proc/{one}"), f"worker {one} should end")


class Interrupted:
    """A move that stands still at a phase."""

    def __init__(
        self, it: VirtualCluster, gates: Path, process: subprocess.Popen[str], route: tuple[int, int], phase: str,
        how: str = "",
    ) -> None:  # fmt: skip
        self.source, self.destination = route
        what = f"{process.pid} {how}".rstrip()
        if self.source != -1:
            assert echo(it, what, f"nodes/{self.source}/migrate").returncode == 0
        gate = gates / phase
        reached = gate.with_suffix(".reached")
        reached.unlink(missing_ok=True)  # those of a tree come there one by one: the last after the test before
        gate.touch()
        self.writer = subprocess.Popen(
            ["bash", "-c", f"echo {what} > {it.mount}/nodes/{self.destination}/migrate"],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said = ""
        try:
            wait_until(lambda: reached.exists() or self.writer.poll() is not None, f"the move should reach {phase}")
            assert reached.exists(), f"it ended before {phase}: {self.finish()}, {self.said}"
            reached.unlink()
        except BaseException:
            self.writer.kill()
            raise
        self.gate = gate

    def finish(self) -> int:
        """The exit code of who asked for the move; `said` is what it said."""
        _, self.said = self.writer.communicate(timeout=60)
        return self.writer.returncode

    def go_on(self) -> int:
        """Opens the gate."""
        self.gate.unlink()
        return self.finish()
