"""`onlost continue`: a node that has lost its master lets its jobs run to their end, and then comes back."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.held import Interrupted, holding
from tests.cluster.virtual import VirtualCluster, cluster, set_link, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

JOB = """
echo here
read -r line || echo "input ended" >> notes
while [ ! -e go ]; do
    head -c 100000 /dev/zero && echo wrote >> notes
    sleep 0.05
done
echo over >> notes
"""


@contextmanager
def running(*command: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of the master, killed at the end where it has not ended."""
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def job(it: VirtualCluster, folder: Path, script: str) -> Iterator[subprocess.Popen[str]]:
    """Has bash run a script on node 0, which has printed its first line."""
    armed = f'echo "$$ onexec" > {it.mount}/nodes/0/migrate && exec /bin/bash -c "$0"'
    with running("/bin/bash", "-c", armed, script, folder=folder) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        yield process


MOVER = """
import os, time
while not os.path.exists("go"):
    with open("moved", "a") as file:
        print(os.uname().nodename, file=file)
    time.sleep(0.05)
"""


def test_jobs_outlive_a_lost_master_and_their_node_comes_back_after_them(tmp_path: Path) -> None:
    notes, moved = tmp_path / "notes", tmp_path / "moved"
    options = ["--netns", "--lease", "3", "--config", "onlost continue"]
    with (
        holding(tmp_path),
        cluster(tmp_path / "m", *options, nodes=1) as it,
        running("/usr/bin/python3", "-c", MOVER, folder=tmp_path) as mover,
        job(it, tmp_path, JOB) as writer,
        job(it, tmp_path, "echo here; kill -STOP $$") as stopped,
    ):
        life = it.slave(0)
        wait_until(moved.exists, "the mover does not run")
        move = Interrupted(it, tmp_path, mover, (0, -1), "depart")
        set_link(it.leg(0), up=False)
        it.wait_state(0, "down")
        assert it.read("nodes/0/reason") == "silent for 4 s; what runs there runs on to its end\n"
        for ghost in (writer, stopped):
            assert ghost.wait(60) == -signal.SIGKILL
        # Nobody takes what it writes, nobody gives it anything, and it runs: the lease has been over for a while.
        wait_until(lambda: "jobs run on to their end" in it.log("n0"), "the jobs do not run on")
        wait_until(notes.exists, "its input is not at its end")
        # What was on its way home was killed here: it goes on there.
        move.go_on()
        elsewhere = moved.read_text().count("n0\n")
        before, others = notes.read_text().count("wrote"), moved.read_text().count("\n")
        wait_until(lambda: notes.read_text().count("wrote") > before + 5, "it does not run on")
        wait_until(lambda: moved.read_text().count("\n") > others + 5, "what was on its way home does not go on")
        assert moved.read_text().count("n0\n") == elsewhere
        # The way is free again, and the node is still busy.
        set_link(it.leg(0), up=True)
        assert it.slave(0) == life and it.state(0) == "down"
        (tmp_path / "go").touch()
        it.wait_state(0, "up")
        assert notes.read_text().startswith("input ended\n") and notes.read_text().endswith("over\n")
        assert mover.wait(60) == 0 and it.slave(0) not in (0, life)
