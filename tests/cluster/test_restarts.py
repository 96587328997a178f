"""kill -9 of the master's daemon, and another one: what lives on nodes lives on, nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import msgpack
import pytest

from bpfs.procs.ledger import Part
from bpfs.rundir import process_start
from tests.cluster.held import Interrupted, holding
from tests.cluster.moving import check_counting, counting, finish, move, place, processes_of, shell, tell
from tests.cluster.outliving import EARLY, HOME, HOP, LATE, LEAVE, STRAIGHT, check_family, check_one_end, check_terminal
from tests.cluster.virtual import VirtualCluster, bpcluster, children, cluster, kill, living, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("open_gates")]

NODES = 2


@pytest.fixture(scope="module")
def it(session_folder, gates) -> Iterator[VirtualCluster]:
    """Its moves stand still at gates, where there are any; so they do with the masters that follow."""
    with holding(gates), cluster(session_folder / "restarts", nodes=NODES) as made:
        yield made


def start_master(it: VirtualCluster) -> None:
    """Another master for the cluster; returns when it is ready."""
    done = bpcluster("restart-master", mount=it.mount)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: it.read("status").split().count("up") == NODES, "all nodes are back")


def test_a_master_that_is_told_to_leave_leaves_all(it):
    """As `systemctl restart` tells it: it ends at once and well, and nothing ends with it."""
    with counting() as process:
        move(it, process.pid, 0)
        copies = processes_of(it, process.pid)
        os.kill(it.pid("master"), signal.SIGUSR1)
        wait_until(lambda: "told to leave all to the next master" in it.log("master"), "it has not heard")
        start_master(it)
        assert place(it, process.pid) == "0" and processes_of(it, process.pid) == copies
        check_counting(finish(process), process.pid)


def test_a_counter_goes_on(it):
    """And everything can be done with it that could be before."""
    with counting() as process:
        move(it, process.pid, 0)
        copies = processes_of(it, process.pid)
        assert len(copies) == 2
        kill(it.pid("master"))
        start_master(it)
        assert place(it, process.pid) == "0"
        assert processes_of(it, process.pid) == copies
        assert it.read(f"procs/{process.pid}/state") == "running\n"
        assert len(it.read(f"procs/{process.pid}/history").splitlines()) == 2
        move(it, process.pid, 1)
        kill(it.pid("master"))
        start_master(it)
        move(it, process.pid, -1)
        assert len(processes_of(it, process.pid)) == 1
        move(it, process.pid, 0)
        check_counting(finish(process), process.pid)
        assert not processes_of(it, process.pid)


def test_a_job_that_ends_while_there_is_no_master(it):
    with counting() as process:
        move(it, process.pid, 1)
        kill(it.pid("master"))
        assert process.stdin is not None
        process.stdin.write("enough\n")
        process.stdin.flush()
        wait_until(lambda: len(processes_of(it, process.pid)) == 1, "the job has ended, its ghost waits")
        start_master(it)
        check_counting(finish(process), process.pid)


def test_a_ghost_that_is_killed_while_there_is_no_master(it):
    with counting() as process:
        move(it, process.pid, 1)
        kill(it.pid("master"))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        start_master(it)
        wait_until(lambda: not processes_of(it, process.pid), "its job is killed, too")


def test_signals_wait_for_the_next_master(it):
    with shell("trap 'echo got; exit 5' USR1; while :; do sleep 0.1; done") as process:
        move(it, process.pid, 0)
        kill(it.pid("master"))
        process.send_signal(signal.SIGUSR1)
        start_master(it)
        assert process.wait(60) == 5
        assert process.stdout.read() == "got\n"


def test_a_family(it, session_folder):
    def restart() -> None:
        kill(it.pid("master"))
        start_master(it)

    check_family(it, session_folder / "told", restart)


def test_a_ghost_that_the_dead_master_had_just_had_made_is_in_nobodys_way(it):
    """Its birth is not in the ledger. Where the node has not been heard in that, it tells of the child again."""
    with shell("read; sleep 1000 >&- 2>&- & echo $!; wait $!; echo $?; exit 8") as process:
        move(it, process.pid, 1)
        tell(process, "go")
        child = int(process.stdout.readline())
        wait_until(lambda: children(process.pid) == [child], "the child has a ghost")
        ghost = {child: process_start(child)[1]}
        kill(it.pid("master"))
        with open(it.rundir.path / "away", "ab") as ledger:
            for part in (Part.AWAY, Part.CHILD):
                ledger.write(msgpack.packb([str(part), child, None]))
        start_master(it)
        wait_until(lambda: not living(ghost), "that ghost has gone")
        (real,) = (int(copy.split()[0]) for copy in processes_of(it, child) if copy.split()[0] != str(child))
        os.kill(real, signal.SIGTERM)
        assert process.stdout.read() == "143\n"
        assert process.wait(60) == 8


def test_output_is_neither_lost_nor_doubled(it):
    """Much of it, for a slow reader."""
    with shell("read; seq 1 200000; exit 4") as process:
        move(it, process.pid, 1)
        tell(process, "go")
        read = [process.stdout.readline() for _ in range(10000)]
        kill(it.pid("master"))
        read += [process.stdout.readline() for _ in range(50000)]
        start_master(it)
        read += process.stdout.readlines()
        assert read == [f"{n}\n" for n in range(1, 200001)]
        assert process.wait(60) == 4


def test_a_terminal(it):
    check_terminal(it, lambda: kill(it.pid("master")), lambda: start_master(it))


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_stopped_jobs(it, when):
    with counting() as process:
        move(it, process.pid, 1)
        if when == "before":
            process.send_signal(signal.SIGSTOP)
            wait_until(lambda: it.read(f"procs/{process.pid}/state") == "stopped\n", "it stops on its node")
        kill(it.pid("master"))
        if when == "meanwhile":
            process.send_signal(signal.SIGSTOP)
        start_master(it)
        wait_until(lambda: it.read(f"procs/{process.pid}/state") == "stopped\n", "it is stopped")
        assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG)
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: it.read(f"procs/{process.pid}/state") == "running\n", "it goes on")
        check_counting(finish(process), process.pid)


def test_periodic_checkpoints_and_onloss(it, session_folder):
    """Of a job and of a process at home: they go on, and the job comes back from its image when its node is lost."""
    with counting() as job, counting() as local:
        move(it, job.pid, 0)
        for process, name, every in ((job, "job", "1s"), (local, "local", "1h")):
            it.write(f"procs/{process.pid}/checkpoint", f"{session_folder}/{name} every {every} keep 2")
            it.write(f"procs/{process.pid}/onloss", "restart")
        kill(it.pid("master"))
        start_master(it)
        for process, name, every in ((job, "job", "1s"), (local, "local", "3600s")):
            file = f"procs/{process.pid}/checkpoint"
            assert it.read(file).startswith(f"every {every} keep 2 {session_folder}/{name}\n")
            assert it.read(f"procs/{process.pid}/onloss") == "restart\n"
        wait_until(lambda: it.read(f"procs/{job.pid}/checkpoint").endswith(" ok\n"), "there is another image")
        it.write(f"procs/{job.pid}/checkpoint", f"{session_folder}/job every 1h")
        kill(it.pid("master"))
        start_master(it)
        it.lose(0)
        wait_until(lambda: place(it, job.pid) == "1", "it comes back from its last image")
        for process in (job, local):
            it.write(f"procs/{process.pid}/checkpoint", "off")
            it.write(f"procs/{process.pid}/onloss", "kill")
        kill(it.pid("master"))
        start_master(it)
        assert it.read(f"procs/{job.pid}/checkpoint") == it.read(f"procs/{local.pid}/checkpoint") == ""
        assert it.read(f"procs/{job.pid}/onloss") == it.read(f"procs/{local.pid}/onloss") == "kill\n"
        assert finish(job)[-1].endswith(" enough")
        check_counting(finish(local), local.pid)


@pytest.mark.parametrize("phase", [*EARLY, *LATE, *STRAIGHT])
def test_moves_are_under_way(it, gates, phase):
    """They have not happened, as long as the source was whole; never are there two copies."""
    with ExitStack() as stack:
        processes = {route: stack.enter_context(counting()) for route in (LEAVE, HOP, HOME)}
        for (source, _), process in processes.items():
            move(it, process.pid, source)
        if phase in STRAIGHT:
            processes = {LEAVE: processes[LEAVE]}
        moves = [Interrupted(it, gates, process, route, phase) for route, process in processes.items()]
        kill(it.pid("master"))
        moves[0].gate.unlink()
        for one in moves:
            one.writer.kill()
            one.writer.communicate()
        start_master(it)
        for process in processes.values():
            check_one_end(it, process, phase in LATE)


def test_a_parent_whose_move_is_under_way(it, gates):
    """It has arrived after all: it can be moved on, and hears of the child that it has left."""
    with shell("sleep 1000 >&- 2>&- & echo $!; read; wait $!; echo $?; exit 8") as process:
        child = int(process.stdout.readline())
        one = Interrupted(it, gates, process, LEAVE, "go")
        kill(it.pid("master"))
        one.gate.unlink()
        one.writer.kill()
        one.writer.communicate()
        start_master(it)
        wait_until(lambda: it.read(f"procs/{process.pid}/state") == "running\n", "what has become of it is known")
        assert place(it, process.pid) == "0"
        move(it, process.pid, 1)
        tell(process, "on")
        os.kill(child, signal.SIGTERM)
        assert process.stdout.read() == "143\n"
        assert process.wait(60) == 8
