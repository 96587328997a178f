"""bpcluster up, status and down, as a user meets them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.moving import counting, move, processes_of
from tests.cluster.virtual import VirtualCluster, bpcluster, cluster, comm, kill, left_behind, living, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_up_status_down(tmp_path):
    mount = tmp_path / "made by up"
    with cluster(mount, nodes=4) as it:
        assert [line.split()[:2] for line in it.read("status").splitlines()] == [[str(n), "up"] for n in range(4)]
        status = bpcluster("status", mount=mount)
        assert (status.returncode, status.stdout) == (0, f"{mount}: 4 up\n0 up\n1 up\n2 up\n3 up\n")
        again = bpcluster("up", mount=mount)
        assert again.returncode == 1 and again.stdout == ""
        assert again.stderr == (
            f"bpcluster: there is a cluster at {mount} already; end it with: bpcluster down --mount {mount}\n"
        )
        # The refusal has harmed nobody.
        assert bpcluster("status", mount=mount).returncode == 0
        assert {os.readlink(f"/proc/{it.pid(f'n{number}')}/ns/uts") for number in range(4)} != {
            os.readlink("/proc/self/ns/uts")
        }
    assert not mount.exists()
    for verb in ("status", "down"):
        none = bpcluster(verb, mount=mount)
        assert (none.returncode, none.stdout) == (1, "")
        assert none.stderr == f"bpcluster: there is no cluster at {mount}\n"


def test_sixteen_nodes(tmp_path):
    with cluster(tmp_path / "m", nodes=16) as it:
        assert it.read("status").count(" up ") == 16
        assert sorted(os.listdir(it.mount / "nodes"), key=int) == [str(number) for number in range(-1, 16)]


def test_clusters_side_by_side(tmp_path):
    with cluster(tmp_path / "a", nodes=2) as a, cluster(tmp_path / "b", nodes=3) as b:
        a.write("nodes/1/state", "unavailable")
        assert a.state(1) == "unavailable" and b.state(1) == "up"
        assert bpcluster("down", mount=b.mount).returncode == 0
        assert a.state(0) == "up"
        # Downed already: make it again, for the context's own end.
        assert bpcluster("up", "--nodes", "1", mount=b.mount).returncode == 0


def test_the_environment_names_the_cluster(tmp_path, monkeypatch):
    with cluster(tmp_path / "m") as it:
        monkeypatch.setenv("BPFS", str(it.mount))
        assert bpcluster("status").stdout.startswith(f"{it.mount}: 2 up")
        monkeypatch.setenv("BPFS", "/nowhere at all")
        assert bpcluster("status").returncode == 1
        assert bpcluster("status", mount=it.mount).returncode == 0


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "required: VERB"),
        (["sideways"], "invalid choice: 'sideways'"),
        (["up", "--nodes", "none"], "'none' is not a number of nodes from 1 to 1000"),
        (["up", "--nodes", "0"], "'0' is not a number of nodes"),
        (["up", "--lease", "-3"], "'-3' is not a lease in seconds"),
        (["up", "--lease", "nan"], "'nan' is not a lease in seconds"),
    ],
)
def test_mistakes_in_the_command_line(args, text):
    done = bpcluster(*args)
    assert done.returncode == 2 and text in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize("args", [["--help"], ["up", "--help"], ["status", "--help"], ["down", "--help"]])
def test_help(args):
    done = bpcluster(*args)
    assert done.returncode == 0 and "--mount DIR" in done.stdout and done.stderr == ""


def test_what_cannot_be_mounted_is_named_and_cleaned_up(tmp_path):
    mount = tmp_path / "file"
    mount.write_text("not a directory")
    done = bpcluster("up", mount=mount)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"bpcluster: the master did not start: {mount} is no directory\n"
    assert left_behind(VirtualCluster(mount), {}) == [] and mount.read_text() == "not a directory"


def test_an_interrupted_up_leaves_nothing(tmp_path):
    mount = tmp_path / "m"
    command = [sys.executable, "-m", "bpfs.cli.bpcluster", "up", "--nodes", "12", "--mount", str(mount)]
    up = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    it = VirtualCluster(mount)
    wait_until(lambda: "n2" in it.rundir.recorded(), "node 2 should be started")
    processes = it.processes()
    up.send_signal(signal.SIGINT)
    _, errors = up.communicate(timeout=60)
    assert "Traceback" not in errors
    if up.returncode == 0:  # it was through before the signal came
        processes |= it.processes()
        assert bpcluster("down", mount=mount).returncode == 0
    assert left_behind(it, processes) == []


# -- kill -9 of anything ---------------------------------------------------------------------------


@pytest.mark.parametrize("with_its_jobs", [True, False])
def test_a_killed_slave_comes_back(tmp_path, with_its_jobs):
    with cluster(tmp_path / "m", nodes=2) as it:
        slave, inits, others = it.slave(1), it.inits(1), it.slave(0)
        (kill if with_its_jobs else lambda _: it.lose(1))(slave)
        wait_until(lambda: it.slave(1) not in (0, slave), "a new slave should be there")
        it.wait_state(1, "up")
        assert living({slave: 0}) == [] and it.slave(0) == others and it.state(0) == "up"
        assert (it.inits(1) == inits) is with_its_jobs
        assert ("starting it afresh" in it.log("n1")) is not with_its_jobs


@pytest.mark.parametrize("victim", ["master", "node", "slave", "init", "all"])
def test_down_after_kill_9(tmp_path, victim):
    with cluster(tmp_path / "m", nodes=3) as it:
        everybody = it.processes()
        victims = {
            "master": [it.pid("master")],
            "node": [it.pid("n1")],
            "slave": [it.slave(1)],
            "init": [pid for pid in everybody if comm(pid) == "nodeinit"],
            "all": [it.pid("master"), *(it.pid(f"n{number}") for number in range(3))],
        }[victim]
        assert victims and 0 not in victims
        for pid in victims:
            kill(pid)
        wait_until(lambda: not living({pid: everybody[pid] for pid in victims}), f"{victim} should be dead")
    # `cluster` has checked that nothing is left, not even of what lived before the kill.
    assert living(everybody) == []


def test_a_killed_node_is_down_and_the_rest_is_well(tmp_path):
    with cluster(tmp_path / "m", "--lease", "3", nodes=3) as it:
        everybody = it.processes()
        inner = {pid: everybody[pid] for pid in (it.slave(1), *it.inits(1))}
        kill(it.pid("n1"))
        it.wait_state(1, "down")
        # Its pid 1 took all of the node with it.
        wait_until(lambda: not living(inner), "the node's processes should be dead")
        assert it.state(0) == it.state(2) == "up"
        assert it.read("nodes/1/reason").strip()
        assert "1 down" in bpcluster("status", mount=it.mount).stdout


def test_slaves_survive_the_master_and_find_the_next_one(session_folder):
    """A killed master leaves slaves that wait for the next one; what administrators made of nodes is in force again.
    Where none comes within the lease, slaves fence themselves, and ghosts end."""
    with cluster(session_folder / "anew", "--lease", "3", nodes=3) as it:
        os.chown(it.mount / "nodes/1", 1234, 4321)
        it.write("nodes/1/mode", "110")
        it.write("nodes/1/state", "unavailable")
        it.write("nodes/2/state", "down")
        wait_until(lambda: it.slave(2), "the slave of node 2 should have started afresh")
        before = it.read("status").splitlines()
        kill(it.pid("master"))
        restart_master(it, before)
        lives = [it.slave(number) for number in range(2)]
        assert it.read("nodes/1/reason") == "unavailable by the administrator\n"
        assert it.read("nodes/2/reason") == "down by the administrator\n"
        with counting() as process:
            move(it, process.pid, 0)
            kill(it.pid("master"))
            assert process.wait(60) == -signal.SIGKILL
            wait_until(lambda: not processes_of(it, process.pid), "the node should have fenced its job")
        for number, life in enumerate(lives):
            wait_until(lambda n=number, old=life: it.slave(n) not in (0, old), f"node {number} should start afresh")
        status = bpcluster("status", mount=it.mount)
        assert (status.returncode, status.stdout) == (1, "")
        assert f"; start it with: bpcluster restart-master --mount {it.mount}\n" in status.stderr
        restart_master(it, before)
        for number in (1, 2):
            it.write(f"nodes/{number}/state", "up")
            assert it.state(number) == "up"
        # The last line of a node counts.
        last = {line.split()[0]: line for line in (it.rundir.path / "nodes").read_text().splitlines()}
        assert last["1"].startswith("1 - 110 1234 4321 n1 ")
        assert last["2"].startswith("2 - 111 0 0 ")


def restart_master(it: VirtualCluster, status: list[str]) -> None:
    """Starts the next master; returns when the nodes are as they were."""
    done = bpcluster("restart-master", mount=it.mount)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wanted = [line.split()[:5] for line in status]
    wait_until(
        lambda: [line.split()[:5] for line in it.read("status").splitlines()] == wanted, "nodes should be as before"
    )


def test_a_stopped_slave_is_killed_when_its_lease_is_over(tmp_path):
    """Its supervisor keeps the lease, so that its jobs end although the slave itself can do nothing."""
    with cluster(tmp_path / "m", "--lease", "2", nodes=1) as it:
        slave = it.slave(0)
        jobs = {pid: started for pid, started in it.processes().items() if comm(pid) == "nodeinit"}
        os.kill(slave, signal.SIGSTOP)
        it.wait_state(0, "down")
        # When the master says down, no job may live any more.
        assert living(jobs) == []
        it.wait_state(0, "up")
        assert it.slave(0) != slave and "outlived its lease" in it.log("n0")


def test_states_by_echo(tmp_path):
    with cluster(tmp_path / "m", nodes=2) as it:
        life = it.slave(1)
        it.write("nodes/1/state", "down")
        assert it.state(1) == "down" and it.read("nodes/1/reason") == "down by the administrator\n"
        wait_until(lambda: it.slave(1) not in (0, life), "the slave should have started afresh")
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            assert it.state(1) == "down"  # it keeps asking, and is not let in
        it.write("nodes/1/state", "up")
        assert it.state(1) == "up" and it.read("nodes/1/reason").strip() == ""
        life = it.slave(1)
        it.write("nodes/1/state", "reboot")
        it.wait_state(1, "up")
        assert it.slave(1) != life
        it.write("nodes/0/state", "pwroff")
        it.wait_state(0, "down")
        assert it.read("nodes/0/reason") == "powered off by the administrator\n"
        with pytest.raises(OSError, match="Host is down"):
            it.write("nodes/0/state", "up")
        for nonsense in ("boot", "banana", "up up"):
            with pytest.raises(OSError, match="Invalid argument"):
                it.write("nodes/1/state", nonsense)
