"""Signals to process groups, from home: who is in the group gets one, wherever it runs, and nobody gets two."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.desk import desk
from tests.cluster.virtual import VirtualCluster, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# A script that moves itself, then starts two more of its group; each writes down every signal it gets.
FAMILY = """
trap 'echo parent USR1 >> {log}' USR1
trap 'echo parent TERM >> {log}; wait; exit 5' TERM
echo $$ > {mount}/nodes/0/migrate
for name in one two; do
    bash -c 'trap "echo $0 USR1 >> {log}" USR1; trap "echo $0 TERM >> {log}; exit 0" TERM
             echo $0 ready >> {log}; while :; do read -t 0.1 <> <(:); done' $name &
done
echo parent ready >> {log}
while :; do wait; done
"""


@pytest.fixture(scope="module")
def it(session_folder: Path) -> Iterator[VirtualCluster]:
    with cluster(session_folder / "groups", nodes=1) as made:
        yield made


@pytest.fixture
def log(session_folder: Path) -> Path:
    path = session_folder / "groups.log"
    path.unlink(missing_ok=True)
    return path


def members(group: int) -> list[int]:
    """The master's processes of a group."""
    found = []
    for stat in [folder / "stat" for folder in Path("/proc").iterdir() if folder.name.isdigit()]:
        try:
            if stat.read_text().rpartition(")")[2].split()[2] == str(group):
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def heard(log: Path) -> Counter[str]:
    """How often each line is in the log."""
    return Counter(log.read_text().splitlines()) if log.exists() else Counter()


@pytest.mark.parametrize("user", [0, 1234])
def test_a_signal_to_the_group_reaches_each_once(it: VirtualCluster, log: Path, user: int) -> None:
    script = FAMILY.format(log=log, mount=it.mount)
    log.touch()
    os.chown(log, user, user)
    process = subprocess.Popen(["bash", "-c", script], process_group=0, user=user, group=user, extra_groups=[])
    names = ("parent", "one", "two")
    try:
        wait_until(lambda: all(heard(log)[f"{name} ready"] for name in names), "all should be there")
        wait_until(lambda: len(members(process.pid)) >= 3, "all should be in the group at home")
        for turn in range(1, 6):
            os.killpg(process.pid, signal.SIGUSR1)
            wait_until(lambda n=turn: all(heard(log)[f"{name} USR1"] == n for name in names), f"signal {turn}")
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 5
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
    assert heard(log) == {f"{name} {word}": n for name in names for word, n in (("ready", 1), ("USR1", 5), ("TERM", 1))}


def test_kill_of_a_job_reaches_all_of_it(it: VirtualCluster, log: Path, tmp_path: Path) -> None:
    script = tmp_path / "family"
    script.write_text(FAMILY.format(log=log, mount=it.mount))
    names = ("parent", "one", "two")
    with desk() as at:
        pid = at.started(f"bash {script}")
        wait_until(lambda: all(heard(log)[f"{name} ready"] for name in names), "all should be there")
        wait_until(lambda: len(members(pid)) >= 3, "all should be in the group at home")
        at.run("kill %1")
        wait_until(lambda: all(heard(log)[f"{name} TERM"] for name in names), "all should have heard it")
        wait_until(lambda: not members(pid), "the job should have ended")
        assert all(heard(log)[f"{name} TERM"] == 1 for name in names)
