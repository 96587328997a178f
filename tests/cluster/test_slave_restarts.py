"""kill -9 of a bpslave: its jobs live on, the next one takes them up, and nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from bpfs.rundir import process_start
from tests.cluster.held import Interrupted, holding
from tests.cluster.moving import check_counting, counting, echo, finish, move, place, processes_of, shell, tell
from tests.cluster.outliving import EARLY, HOME, HOP, LATE, LEAVE, STRAIGHT, check_family, check_one_end, check_terminal
from tests.cluster.virtual import (
    VirtualCluster,
    bpcluster,
    cluster,
    comm,
    kill,
    living,
    set_link,
    wait_until,
)

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("open_gates")]

NODES = 2


@pytest.fixture(scope="module")
def it(session_folder, gates) -> Iterator[VirtualCluster]:
    """Its moves stand still at gates, where there are any."""
    with holding(gates), cluster(session_folder / "slaves", nodes=NODES) as made:
        yield made


def restart(it: VirtualCluster, number: int) -> None:
    """kill -9 of a slave; returns when the next one has taken up what was there."""
    slave, inits = it.slave(number), it.inits(number)
    kill(slave)
    wait_back(it, number, slave)
    assert it.inits(number) == inits


def wait_back(it: VirtualCluster, number: int, slave: int) -> None:
    wait_until(lambda: it.slave(number) not in (0, slave), "another slave comes")
    it.wait_state(number, "up")


def test_a_counter_goes_on(it):
    """And everything can be done with it that could be before; twice, and with moves in between."""
    with counting() as process:
        move(it, process.pid, 0)
        copies = processes_of(it, process.pid)
        assert len(copies) == 2
        restart(it, 0)
        restart(it, 0)
        assert place(it, process.pid) == "0"
        assert processes_of(it, process.pid) == copies
        move(it, process.pid, 1)
        restart(it, 1)
        move(it, process.pid, 0)
        restart(it, 0)
        move(it, process.pid, -1)
        assert len(processes_of(it, process.pid)) == 1
        move(it, process.pid, 0)
        check_counting(finish(process), process.pid)
        assert not processes_of(it, process.pid)


def test_a_job_that_ends_while_there_is_no_slave(it):
    """The supervisor is stopped meanwhile, so that it cannot start another one."""
    with counting() as process:
        move(it, process.pid, 1)
        supervisor, slave = it.pid("n1"), it.slave(1)
        os.kill(supervisor, signal.SIGSTOP)
        try:
            kill(slave)
            process.stdin.write("enough\n")
            process.stdin.flush()
            wait_until(lambda: len(processes_of(it, process.pid)) == 1, "the job has ended, its ghost waits")
        finally:
            os.kill(supervisor, signal.SIGCONT)
        check_counting(finish(process), process.pid)
        wait_back(it, 1, slave)


def test_output_is_neither_lost_nor_doubled(it):
    """Much of it, for a slow reader."""
    with shell("read; seq 1 200000; exit 4") as process:
        move(it, process.pid, 1)
        tell(process, "go")
        read = [process.stdout.readline() for _ in range(10000)]
        restart(it, 1)
        read += [process.stdout.readline() for _ in range(50000)]
        kill(it.slave(1))
        read += process.stdout.readlines()
        assert read == [f"{n}\n" for n in range(1, 200001)]
        assert process.wait(60) == 4
        it.wait_state(1, "up")


def test_a_family(it, session_folder):
    check_family(it, session_folder / "told-slaves", lambda: restart(it, 0))


def test_forks_and_ends_meanwhile_are_heard_of(it):
    """A loop that forks all the time, and a parent here whose child is there."""
    with shell("sleep 100 & c=$!; echo $c; wait $c; echo $?; exit 8") as parent:
        child = int(parent.stdout.readline())
        with shell("read; for i in $(seq 1 60); do (exit $i); s=$?; [ $s = $i ] || echo bad; sleep 0.02; done") as loop:
            move(it, child, 0)
            move(it, loop.pid, 0)
            tell(loop, "go")
            restart(it, 0)
            kill(it.slave(0))
            assert loop.stdout.read() == ""
            assert loop.wait(60) == 0
        os.kill(child, signal.SIGTERM)
        assert parent.stdout.read() == "143\n"
        assert parent.wait(60) == 8
    it.wait_state(0, "up")


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_stopped_jobs(it, when):
    with counting() as process:
        move(it, process.pid, 1)
        if when == "before":
            process.send_signal(signal.SIGSTOP)
            wait_until(lambda: it.read(f"procs/{process.pid}/state") == "stopped\n", "it stops on its node")
        slave = it.slave(1)
        kill(slave)
        if when == "meanwhile":
            process.send_signal(signal.SIGSTOP)
        wait_back(it, 1, slave)
        wait_until(lambda: it.read(f"procs/{process.pid}/state") == "stopped\n", "it is stopped")
        assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG)
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: it.read(f"procs/{process.pid}/state") == "running\n", "it goes on")
        check_counting(finish(process), process.pid)


def test_signals_wait_for_the_next_slave(it):
    with shell("trap 'echo got; exit 5' USR1; while :; do sleep 0.1; done") as process:
        move(it, process.pid, 0)
        slave = it.slave(0)
        kill(slave)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 5
        assert process.stdout.read() == "got\n"
        wait_back(it, 0, slave)


def test_a_ghost_that_is_killed_while_there_is_no_slave(it):
    with counting() as process:
        move(it, process.pid, 1)
        slave = it.slave(1)
        kill(slave)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        wait_back(it, 1, slave)
        wait_until(lambda: not processes_of(it, process.pid), "its job is killed, too")


def test_a_terminal(it):
    slave = it.slave(0)
    check_terminal(it, lambda: kill(slave), lambda: wait_back(it, 0, slave))


def test_a_strict_job(it):
    with shell("read; kill -0 $PPID && (exit 4); echo $?") as process:
        assert echo(it, f"{process.pid} strict", "nodes/0/migrate").returncode == 0
        restart(it, 0)
        tell(process, "go")
        assert process.stdout.read() == "4\n"
        assert process.wait(60) == 0


def test_the_tree_is_there_again(it):
    """For jobs, too: one moves itself."""
    with shell(f"read; echo $$ > {it.mount}/nodes/1/migrate; cat {it.mount}/procs/$$/node; exit 2") as process:
        move(it, process.pid, 0)
        restart(it, 0)
        tell(process, "go")
        assert process.stdout.read() == "1\n"
        assert process.wait(60) == 2


def test_a_users_job(it):
    script = "echo on; read; id -u; (exit 3); exit $?"
    with subprocess.Popen(
        ["/bin/bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user=1234, group=1234,
        extra_groups=[], cwd="/",
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "on\n"
        move(it, process.pid, 0)
        restart(it, 0)
        tell(process, "go")
        assert process.stdout.read() == "1234\n"
        assert process.wait(60) == 3


def test_started_anew_in_order(it):
    """The supervisor goes on as another program, too."""
    with counting() as process:
        move(it, process.pid, 1)
        slave, inits = it.slave(1), it.inits(1)
        done = bpcluster("restart-slave", "1", mount=it.mount)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert it.slave(1) not in (0, slave) and it.inits(1) == inits
        assert b"bpfs.slave.anew" in Path(f"/proc/{it.pid('n1')}/cmdline").read_bytes()
        restart(it, 1)
        move(it, process.pid, 0)
        check_counting(finish(process), process.pid)
    done = bpcluster("restart-slave", "7", mount=it.mount)
    assert (done.returncode, done.stderr) == (1, f"bpcluster: there is no virtual node 7 at {it.mount}\n")


def test_one_after_another_is_killed(it):
    """None of them lives for long enough to take up the jobs: the node starts afresh."""
    with counting() as process:
        move(it, process.pid, 1)
        inits = {pid: process_start(pid)[1] for pid in it.inits(1)}

        def over() -> bool:
            if living(inits) and (slave := it.slave(1)):
                with suppress(ProcessLookupError):
                    kill(slave)
            return not living(inits)

        wait_until(over, "the jobs are to end")
        assert process.wait() == -signal.SIGKILL
        it.wait_state(1, "up")


def test_no_master_is_found_within_the_lease(tmp_path):
    with cluster(tmp_path / "m", "--netns", "--lease", "3", nodes=1) as it, counting() as process:
        move(it, process.pid, 0)
        jobs = {pid: started for pid, started in it.processes().items() if comm(pid) == "nodeinit"}
        set_link(it.leg(0), up=False)
        kill(it.slave(0))
        assert process.wait(60) == -signal.SIGKILL
        # When its ghost has ended nothing of it lives any more.
        assert living(jobs) == [] and len(processes_of(it, process.pid)) == 0
        set_link(it.leg(0), up=True)
        it.wait_state(0, "up")


def test_nobody_but_nodeinit_is_left_to_heed_the_lease(tmp_path):
    """The slave is killed, and its supervisor stands still."""
    with cluster(tmp_path / "m", "--lease", "2", nodes=1) as it, counting() as process:
        move(it, process.pid, 0)
        jobs = {pid: started for pid, started in it.processes().items() if comm(pid) == "nodeinit"}
        assert jobs
        supervisor = it.pid("n0")
        os.kill(supervisor, signal.SIGSTOP)
        try:
            kill(it.slave(0))
            assert process.wait(60) == -signal.SIGKILL
            # As above. Only nodeinit waits to be reaped.
            assert living(jobs) == [] and len(processes_of(it, process.pid)) == 0
        finally:
            os.kill(supervisor, signal.SIGCONT)
        it.wait_state(0, "up")
        with counting() as another:
            move(it, another.pid, 0)
            check_counting(finish(another), another.pid)


@pytest.mark.parametrize("route", [LEAVE, HOP, HOME], ids=["leave", "hop", "home"])
@pytest.mark.parametrize("phase", [*EARLY, *LATE, *STRAIGHT])
def test_moves_are_under_way(it, gates, phase, route):
    """The slave of the source, or that of the destination, is killed: it lives on at one of the two places."""
    with ExitStack() as stack:
        for role in (0, 1):
            if route[role] == -1:
                continue
            process = stack.enter_context(counting())
            one = Interrupted(it, gates, process, route, phase)
            slave = it.slave(route[role])
            kill(slave)
            one.go_on()
            wait_back(it, route[role], slave)
            check_one_end(it, process, phase in LATE and role == 1)
