"""What jobs fork on a node: ghosts on the master that are, look and end as the real children do."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from engine.linux import procfs, ptrace
from tests.cluster.moving import echo, place
from tests.cluster.virtual import children, cluster, comm, kill, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def it(session_folder):
    with cluster(session_folder / "births", nodes=2) as made:
        yield made


def stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on: state, ppid, pgrp, session; all X when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X"] * 4


def cmdline(pid: int) -> str:
    """Its command line, in words."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()
    except OSError:
        return ""


def away(it) -> list[int]:
    """The processes that are on nodes, as /bpfs says."""
    return [int(name) for name in os.listdir(it.mount / "procs") if name.isdigit()]


@contextmanager
def on_node(it, script: str, node: int = 1, shell: str = "bash", user: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A script on a node: the shell moves itself first. Lines come on stdout."""
    process = subprocess.Popen(
        [shell, "-c", f"echo $$ > {it.mount}/nodes/{node}/migrate || exit 99\n{script}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, user=user or None,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        for pid in away(it):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: away(it) == [], "the job and its children should end")


def ghost_child(parent: int, name: str) -> int:
    """The pid of a child's ghost with this command line, once there is one."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [pid for pid in children(parent) if cmdline(pid) == name]
        return bool(found)

    wait_until(look, f"a child of {parent} should show as {name!r}")
    return found[0]


def test_children_are_in_ps_below_their_parent(it):
    with on_node(it, "sleep 71 & (sleep 72; true) & echo $! ; wait") as job:
        middle = int(job.stdout.readline())
        first = ghost_child(job.pid, "sleep 71")
        second = ghost_child(middle, "sleep 72")
        assert stat(middle)[1:4] == [str(job.pid), *stat(job.pid)[2:4]]
        assert stat(first)[1:4] == [str(job.pid), *stat(job.pid)[2:4]]
        assert comm(second) == "sleep"
        assert {str(first), str(middle), str(second), str(job.pid)} <= set(os.listdir(it.mount / "nodes/1/procs"))
        assert place(it, first) == "1"
        assert it.read(f"procs/{second}/state") == "running\n"
        assert "sleep\x0072" in it.read(f"procs/{second}/cmdline")
        assert it.read(f"procs/{second}/history").startswith("1 ")
        assert "utime" in it.read(f"procs/{second}/rusage") or it.read(f"procs/{second}/rusage")
        # The ids are the same over there.
        shown = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True).stdout
        assert {int(word) for word in shown.split()} == {first, middle}


def test_a_ghost_that_does_not_answer_keeps_no_other_from_its_children(it, tmp_path):
    # What comes on stdin, or as a signal, a traced ghost would not pass on.
    forks = (
        "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "if not os.fork(): time.sleep(1000)\nos.wait()"
    )
    script = "exec /usr/bin/python3 -c '" + forks + "' " + str(tmp_path)
    with on_node(it, f"{script}/slow") as slow, on_node(it, f"{script}/quick") as quick:
        wait_until(lambda: {slow.pid, quick.pid} <= set(away(it)), "both should be there")
        with open(it.mount / "events") as events:
            ptrace.seize(slow.pid, 0)
            ptrace.interrupt(slow.pid)
            ptrace.wait(slow.pid)
            (tmp_path / "slow").touch()
            wait_until(lambda: len(away(it)) == 3, "the slow one should have a child")
            (tmp_path / "quick").touch()
            born = (f"forked by {slow.pid}", f"forked by {quick.pid}")
            assert next(line for line in events if line.strip().endswith(born)).strip().endswith(born[1])
            ptrace.detach(slow.pid)
        for pid in set(away(it)) - {slow.pid, quick.pid}:  # one may have no ghost
            it.write(f"procs/{pid}/signal", "9")


@pytest.mark.parametrize("how", ["kill", "bpfs"])
@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1], ids=str)
def test_signals_to_a_ghost_reach_the_child(it, how, signo):
    with on_node(it, "sleep 73 & wait $!; echo $?") as job:
        child = ghost_child(job.pid, "sleep 73")
        if how == "kill":
            os.kill(child, signo)
        else:
            assert echo(it, int(signo), f"procs/{child}/signal").returncode == 0
        assert job.stdout.readline() == f"{128 + signo}\n"
        assert job.wait(60) == 0
        wait_until(lambda: stat(child)[0] == "X", "the child's ghost should end")


def test_stop_and_continue_a_child(it):
    with on_node(it, "sleep 74 & wait") as job:
        child = ghost_child(job.pid, "sleep 74")
        os.kill(child, signal.SIGSTOP)
        wait_until(lambda: it.read(f"procs/{child}/state") == "stopped\n", "it should be stopped on its node")
        os.kill(child, signal.SIGCONT)
        wait_until(lambda: it.read(f"procs/{child}/state") == "running\n", "it should go on on its node")
        wait_until(lambda: stat(child)[0] == "S", "its ghost should go on")


def test_a_stop_by_another_job_is_shown(it):
    with on_node(it, "sleep 75 & kill -STOP $!; read x; kill -CONT $!; read x; kill $!; wait $!; echo $?") as job:
        wait_until(lambda: [stat(pid)[0] for pid in children(job.pid)] == ["T"], "its ghost should stop")
        (child,) = children(job.pid)
        job.stdin.write("\n")
        job.stdin.flush()
        wait_until(lambda: stat(child)[0] == "S", "its ghost should go on")
        job.stdin.write("\n")
        job.stdin.flush()
        assert job.stdout.readline() == "143\n"


def test_exec_session_group_and_user_are_kept_in_step(it):
    script = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setpgid(0, 0)
        os.setgid(65534); os.setuid(65534)
        print(os.getpid(), os.getppid(), os.getpgrp(), os.getsid(0), flush=True)
        os.execv("/bin/sleep", ["other-name", "76"])
    os.wait()
    os._exit(0)
os.wait()
"""
    with on_node(it, f"exec /usr/bin/python3 -c '{script}'") as job:
        pid, ppid, pgid, sid = map(int, job.stdout.readline().split())
        wait_until(lambda: cmdline(pid) == "other-name 76", "the program should show")
        wait_until(lambda: stat(pid)[1:4] == [str(ppid), str(pgid), str(sid)], "its ids should show")
        wait_until(lambda: os.stat(f"/proc/{pid}").st_uid == 65534, "its user should show")
        assert os.stat(f"/proc/{pid}").st_gid == 65534
        assert stat(ppid)[1:4] == [str(job.pid), str(sid), str(sid)]
        assert os.stat(it.mount / f"procs/{pid}/node").st_uid == 65534


def test_a_child_that_outlives_its_parent_is_inits(it):
    with on_node(it, "(sleep 77 & echo $!); read x") as job:
        child = int(job.stdout.readline())
        wait_until(lambda: cmdline(child) == "sleep 77", "the child should show")
        job.stdin.write("\n")
        job.stdin.flush()
        assert job.wait(60) == 0
        wait_until(lambda: stat(child)[1] == "1", "it should be init's")
        os.kill(child, signal.SIGTERM)
        wait_until(lambda: stat(child)[0] == "X", "it should end")
        wait_until(lambda: not (it.mount / f"procs/{child}/node").exists(), "it should end on its node")


def reads(pid):
    """Whether a process waits in a read(2) or a copy_file_range(2) of a file that it has opened."""
    call = Path(f"/proc/{pid}/syscall").read_text().split()
    return call[0] in ("0", "326") and call[1] == "0x3"


def test_wait_tells_how_a_child_ended(it):
    with on_node(it, 'exec 3<&0; bash -c "read x <&3; exit 9" & echo $!; wait $!; echo $?') as job:
        child = int(job.stdout.readline())
        wait_until(lambda: (it.mount / f"procs/{child}/wait").exists(), "the child should show")
        waiting = subprocess.Popen(["cat", it.mount / f"procs/{child}/wait"], stdout=subprocess.PIPE, text=True)
        try:
            wait_until(lambda: reads(waiting.pid), "the reader should wait")
            job.stdin.write("\n")
            job.stdin.flush()
            assert waiting.communicate(timeout=60)[0] == "exit 9\n"
        finally:
            waiting.kill()
            waiting.wait()


def test_a_zombie_on_the_node_is_one_on_the_master(it):
    script = "import os, signal, sys\nif os.fork() == 0: signal.pause()\nprint(1, flush=True)\n"
    script += "sys.stdin.readline(); print(os.wait()[1], flush=True); sys.stdin.readline()"
    with on_node(it, f"exec /usr/bin/python3 -c '{script}'") as job:
        job.stdout.readline()
        wait_until(lambda: children(job.pid), "the child should show")
        (child,) = children(job.pid)
        os.kill(child, signal.SIGTERM)
        wait_until(lambda: stat(child)[0] == "Z", "its ghost should be a zombie, too")
        job.stdin.write("\n")
        job.stdin.flush()
        assert job.stdout.readline() == "15\n"
        wait_until(lambda: stat(child)[0] == "X", "its ghost should have been waited for, too")


def test_many_children_leave_nothing(it):
    script = "for i in $(seq 300); do true | cat & done; wait; for i in $(seq 40); do sleep 0.05 & done; wait; echo ok"
    with on_node(it, f"({script}) | cat; echo ${{PIPESTATUS[*]}}; read x") as job:
        assert job.stdout.readline() == "ok\n"
        assert job.stdout.readline() == "0 0\n"
        wait_until(lambda: children(job.pid) == [], "no child's ghost should be left")
        assert [pid for pid in os.listdir(it.mount / "nodes/1/procs") if pid != str(job.pid)] == []


def test_ghosts_of_children_end_with_their_node(session_folder):
    with (
        cluster(session_folder / "birthslost", "--lease", "2", nodes=1) as it,
        on_node(it, "sleep 78 & sleep 79 & wait", node=0) as job,
    ):
        child = ghost_child(job.pid, "sleep 78")
        other = ghost_child(job.pid, "sleep 79")
        kill(it.pid("n0"))
        assert job.wait(60) == -signal.SIGKILL
        wait_until(lambda: stat(child)[0] == stat(other)[0] == "X", "the children's ghosts should end")


@pytest.mark.parametrize("attempt", range(5))
def test_what_a_process_has_signalled_as_its_last_act_arrives(it, attempt):
    script = f"""
        for i in 1 2 3 4 5 6; do sleep 1000 <&- >&- 2>&- & all="$all $!"; done
        echo $all; echo $$ > {it.mount}/nodes/1/migrate || exit 99
        kill $all; exit 3"""
    with subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True) as shell:
        sleeping = [int(pid) for pid in shell.stdout.readline().split()]
        try:
            assert shell.wait(60) == 3
            for pid in sleeping:
                wait_until(lambda pid=pid: procfs.has_ended(f"/proc/{pid}"), f"process {pid} should end")
        finally:
            for pid in sleeping:
                with suppress(ProcessLookupError):
                    kill(pid)
