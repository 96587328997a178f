"""The job pid namespace with real processes in it."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import jobspace, placeholders
from engine.jobspace import JobSpace, Kind
from engine.linux import pidfd
from tests.engine.births import Reports, bear, until, victim

BLOCK = range(100000, 110000)


@pytest.fixture
def space() -> Iterator[JobSpace]:
    gc.collect()  # what tests before this one have left, and would be closed in the midst of it
    before = sorted(os.listdir("/proc/self/fd"))
    made = JobSpace.start(BLOCK)
    yield made
    made.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def is_dead(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_header_and_mirror_agree(tmp_path: Path) -> None:
    header = Path(jobspace.__file__).parent / "csrc" / "nodeinit.h"
    fields = "kind pid reporter code status uid utime_us stime_us maxrss_kb sender zero".split()  # noqa: SIM905
    words = ", ".join(f"(int)offsetof(struct report, {name})" for name in fields)
    commands = "COMMAND_SETSID, COMMAND_SETPGID, COMMAND_SIBLING, COMMAND_KILL_ALL, COMMAND_SEND, COMMAND_BEAR"
    birth = "birth_head birth_table birth_file birth_row".split()  # noqa: SIM905
    sizes = ", ".join(f"(int)sizeof(struct {name})" for name in birth)
    last = "(int)offsetof(struct birth_head, link), (int)offsetof(struct birth_row, argument)"
    code = f"""#include <stddef.h>
    #include <stdio.h>
    #include "{header}"
    int main(void) {{
        unsigned values[] = {{{words}, sizeof(struct report), {commands}, {sizes}, {last}}};
        for (unsigned i = 0; i < sizeof values / sizeof *values; i++) printf("%u ", values[i]);
    }}"""
    (tmp_path / "sizes.c").write_text(code)
    subprocess.run(["gcc", "-o", tmp_path / "sizes", tmp_path / "sizes.c"], check=True)
    got = [int(word) for word in subprocess.check_output([tmp_path / "sizes"]).split()]
    mirror = jobspace.REPORT
    offsets = [0, 4, 8, 12, 16, 20, 24, 32, 40, 48, 52]
    command = placeholders.Command
    orders = [command.SETSID, command.SETPGID, command.SIBLING, command.KILL_ALL, command.SEND, command.BEAR]
    assert got == [*offsets, mirror.size, *orders, 48, 16, 40, 64, 24, 16]  # engine/bearing.py, engine/execorder.py


def test_start_and_close(space: JobSpace) -> None:
    assert space.hostpid(1) == space.init
    assert space.jobpid(space.init) == 1
    assert space.jobpid(os.getpid()) is None
    assert space.hostpid(4711) is None
    assert space.processes() == [] and space.placeholders() == []
    assert os.stat(f"/proc/{space.init}/ns/mnt").st_ino != os.stat("/proc/self/ns/mnt").st_ino
    assert Path(f"/proc/{space.init}/root/proc/1/comm").read_text() == "nodeinit\n"
    init = space.init
    space.close()
    assert is_dead(init)
    space.close()


@pytest.mark.parametrize(
    "ids",
    [
        (5000, 4000, 4500, 3000),  # all leaders apart: a process of a pipeline whose parent is neither leader
        (5000, 4000, 5000, 4000),  # a job of an interactive shell
        (5000, 4000, 5000, 3000),
        (5000, 4000, 4000, 4000),  # a command of a script that leads its session
        (5000, 4000, 4000, 3000),
        (5000, 4000, 3000, 3000),
        (5000, 4000, 5000, 5000),  # it leads its own session
        (5000, 1, 5000, 3000),  # an orphan in a session
        (5000, 1, 4500, 3000),
        (5000, 1, 1, 1),
    ],
    ids=str,
)
def test_ids_as_seen_from_inside(space: JobSpace, tmp_path: Path, ids: tuple[int, int, int, int]) -> None:
    seen = victim(space, tmp_path, *ids)
    assert tuple(seen.values()) == ids
    assert space.processes() == [5000]
    hostpid = space.hostpid(5000)
    assert hostpid is not None and space.jobpid(hostpid) == 5000


def test_ids_from_outside_are_nodeinit(space: JobSpace, tmp_path: Path) -> None:
    assert victim(space, tmp_path, 5000, 0, 0, 0) == {"pid": 5000, "ppid": 1, "pgid": 1, "sid": 1}
    assert space.placeholders() == []


def test_leaders_are_shared_and_real_ones_used(space: JobSpace, tmp_path: Path) -> None:
    victim(space, tmp_path, 4000, 1, 4000, 4000)
    assert space.placeholders() == []
    assert victim(space, tmp_path, 5000, 4000, 5000, 4000)["ppid"] == 4000
    assert space.placeholders() == []
    victim(space, tmp_path, 6000, 3000, 6000, 3000)
    victim(space, tmp_path, 6001, 3000, 6000, 3000)
    assert space.placeholders() == [3000]


def test_a_parent_becomes_a_session_leader(space: JobSpace, tmp_path: Path) -> None:
    # setsid was called by the first child, so nothing is known of its parent's session; the second tells.
    victim(space, tmp_path, 5000, 4000, 5000, 5000)
    assert tuple(victim(space, tmp_path, 5001, 4000, 5001, 4000).values()) == (5001, 4000, 5001, 4000)
    assert tuple(victim(space, tmp_path, 5002, 4000, 4000, 4000).values()) == (5002, 4000, 4000, 4000)
    assert space.placeholders() == [4000]


def test_a_group_outlives_its_leader(space: JobSpace, tmp_path: Path) -> None:
    victim(space, tmp_path, 5000, 4000, 5000, 4000)
    victim(space, tmp_path, 5001, 4000, 5000, 4000)
    space.signal(5000, signal.SIGKILL)
    until("the leader to die", lambda: space.hostpid(5000) is None)
    assert victim(space, tmp_path, 5002, 4000, 5000, 4000)["pgid"] == 5000


def test_a_pid_in_use_is_refused(space: JobSpace, tmp_path: Path) -> None:
    victim(space, tmp_path, 5000, 1, 5000, 5000)
    with pytest.raises(FileExistsError), placeholders.placing(space.init, 5000, 1, 5000, 5000):
        pass


def test_stop_continue_exit_and_usage(space: JobSpace, tmp_path: Path) -> None:
    reports = Reports(space)
    victim(space, tmp_path, 5000, 4000, 4500, 3000)
    space.signal(5000, signal.SIGTSTP)  # the kernel drops it in an orphaned group
    stop = reports.wait("the stop", lambda report: report.pid == 5000)
    assert (stop.kind, stop.code, stop.status) == (Kind.CHILD, os.CLD_STOPPED, signal.SIGTSTP)
    assert stop.reporter == 4000
    space.signal(5000, signal.SIGCONT)
    reports.wait("the continuing", lambda report: report.code == os.CLD_CONTINUED)
    space.signal(5000, signal.SIGUSR1)
    end = reports.wait("the end", lambda report: report.code == os.CLD_EXITED)
    assert (end.pid, end.status) == (5000, 7)
    assert end.utime_us + end.stime_us > 0 and end.maxrss_kb > 1000
    assert all(report.pid == 5000 for report in reports.seen)


def test_death_by_signal(space: JobSpace, tmp_path: Path) -> None:
    reports = Reports(space)
    victim(space, tmp_path, 5000, 0, 5000, 5000)
    space.signal(5000, signal.SIGTERM)
    end = reports.wait("the end", lambda report: report.pid == 5000)
    assert (end.code, end.status, end.reporter) == (os.CLD_KILLED, signal.SIGTERM, 1)
    with pytest.raises(ProcessLookupError):
        space.signal(5000, signal.SIGTERM)


def test_an_ordinary_job_signals_its_parent_elsewhere(space: JobSpace) -> None:
    reports = Reports(space)
    code = "import os; os.setresuid(1234, 1234, 1234); os.kill(os.getppid(), 10); os.kill(0, 0)"
    bear(space, 5000, 4000, 4500, 4000, [sys.executable, "-c", code], uid=1234)
    report = reports.wait("the signal", lambda report: report.kind == Kind.SIGNAL)
    assert (report.pid, report.status, report.sender, report.uid) == (4000, signal.SIGUSR1, 5000, 1234)
    reports.wait("the end", lambda report: report.pid == 5000)
    assert 4000 in space.placeholders()


def test_queued_values_are_reported_and_no_command_is_taken_from_a_job(space: JobSpace) -> None:
    reports = Reports(space)
    # A siginfo_t that claims to come from outside (si_pid 0) and asks for process 77: the cookie is wrong.
    code = (
        "import ctypes, struct, os\n"
        "info = struct.pack('=iiiiiIQ', 64, 0, -1, 0, 0, 0, 0xbad << 32 | 77).ljust(128, b'\\0')\n"
        "assert ctypes.CDLL(None).syscall(129, os.getppid(), 64, info) == 0\n"
    )
    bear(space, 5000, 4000, 5000, 4000, [sys.executable, "-c", code])
    report = reports.wait("the signal", lambda report: report.kind == Kind.SIGNAL)
    assert (report.pid, report.status, report.value) == (4000, 64, 0xBAD << 32 | 77)
    end = reports.wait("the end", lambda report: report.pid == 5000)
    assert end.status == 0
    assert space.hostpid(77) is None


def test_a_placeholder_that_a_job_kills_is_reported(space: JobSpace) -> None:
    reports = Reports(space)
    bear(space, 5000, 4000, 5000, 4000, [sys.executable, "-c", "import os; os.kill(os.getppid(), 9)"])
    report = reports.wait("the death", lambda report: report.pid == 4000)
    assert (report.code, report.status, report.reporter) == (os.CLD_KILLED, signal.SIGKILL, 1)


def test_failed_command_is_reported(space: JobSpace, tmp_path: Path) -> None:
    victim(space, tmp_path, 5000, 1, 5000, 5000)
    placeholders.command(space.init, space.init, placeholders.Command.NONE, 5000)
    report = Reports(space).wait("the failure", lambda report: report.kind == Kind.FAILED)
    assert (report.pid, report.status) == (5000, errno.EEXIST)


def test_orphans_are_reaped_and_forks_come_from_the_block(space: JobSpace, tmp_path: Path) -> None:
    if not space.has_block:
        pytest.skip("this kernel lets no pid block be set")
    file = tmp_path / "child"
    script = (
        f"(exec sh -c 'echo $$ > {file}.new; mv {file}.new {file}; while [ -e {file} ]; do :; done; exit 3') & exit 0"
    )
    reports = Reports(space)
    bear(space, 5000, 4000, 5000, 4000, ["/bin/sh", "-c", script])
    reports.wait("the parent's end", lambda report: report.pid == 5000)
    until("the child's pid", file.exists)
    child = int(file.read_text())
    assert child in BLOCK
    file.unlink()
    end = reports.wait("the orphan's end", lambda report: report.pid == child)
    assert (end.reporter, end.code, end.status) == (1, os.CLD_EXITED, 3)


def test_the_block_starts_over_before_its_end() -> None:
    block = range(200000, 200400)
    space = JobSpace.start(block)
    try:
        if not space.has_block:
            pytest.skip("this kernel lets no pid block be set")
        # Forks a few dozen times a second until it is given a low pid again; says so by its status.
        code = (
            "import os, time\n"
            "high = 0\n"
            "while True:\n"
            "    pid = os.fork() or os._exit(0)\n"
            "    os.waitpid(pid, 0)\n"
            f"    if pid < high and high > {block.start + 150}: os._exit(0 if pid < {block.start + 100} else 1)\n"
            "    high = max(high, pid)\n"
            f"    if high >= {block.stop}: os._exit(2)\n"
            "    time.sleep(0.01)\n"
        )
        reports = Reports(space)
        bear(space, 5000, 1, 5000, 5000, [sys.executable, "-c", code])
        assert reports.wait("the end", lambda report: report.pid == 5000).status == 0
    finally:
        space.close()


def test_placeholders_go_when_nobody_needs_them(space: JobSpace, tmp_path: Path) -> None:
    reports = Reports(space)
    victim(space, tmp_path, 5000, 4000, 4500, 3000)
    victim(space, tmp_path, 5001, 3000, 5001, 3000)
    assert space.drop_unneeded_placeholders() == []
    with placeholders.placing(space.init, 5002, 4002, 4002, 4002):
        # A birth is going on: its placeholders are not needed yet.
        assert space.drop_unneeded_placeholders() is None
    assert space.drop_unneeded_placeholders() == [4002]
    space.signal(5000, signal.SIGKILL)
    reports.wait("the end", lambda report: report.pid == 5000)
    assert space.drop_unneeded_placeholders() == [4000, 4500]
    until("their end", lambda: space.placeholders() == [3000])
    # Only what jobs do is reported.
    space.signal(5001, signal.SIGKILL)
    reports.wait("the end", lambda report: report.pid == 5001)
    assert {report.pid for report in reports.seen} == {5000, 5001}


def test_an_end_is_told_even_if_the_placeholder_that_waited_is_killed(space: JobSpace, tmp_path: Path) -> None:
    victim(space, tmp_path, 5000, 4000, 4500, 3000)
    # A group leader's placeholder fills the socket, so that the parent's has to wait before it can tell.
    leader = space.open_process(4500)
    for _ in range(2000):
        pidfd.queue(leader, 40, 0, 0)
    os.close(leader)
    until("the socket to be full", lambda: is_sending(space, 4500))
    space.signal(5000, signal.SIGKILL)
    until("the parent to tell", lambda: is_sending(space, 4000))
    space.signal(4000, signal.SIGKILL)
    assert Reports(space).wait("the end", lambda report: report.pid == 5000).code == os.CLD_KILLED


def is_sending(space: JobSpace, pid: int) -> bool:
    """Whether it waits in sendto(2)."""
    return Path(f"/proc/{space.hostpid(pid)}/syscall").read_text().startswith("44 ")


def test_a_parent_that_ended_elsewhere(space: JobSpace, tmp_path: Path) -> None:
    victim(space, tmp_path, 5000, 4000, 5000, 3000)
    space.drop_placeholder(4000)
    stat = Path(f"/proc/{space.init}/root/proc/5000/stat")
    until("nodeinit to adopt the child", lambda: stat.read_text().rpartition(")")[2].split()[1] == "1")
    with pytest.raises(ProcessLookupError):
        space.drop_placeholder(5000)


def test_kill_all(space: JobSpace, tmp_path: Path) -> None:
    reports = Reports(space)
    victim(space, tmp_path, 5000, 4000, 4500, 3000)
    victim(space, tmp_path, 5001, 1, 5001, 5001)
    space.kill_all()
    reports.wait("the end", lambda report: report.pid == 5001)
    until("all to go", lambda: not space.processes() and not space.placeholders())
    assert not is_dead(space.init)
    assert victim(space, tmp_path, 5000, 4000, 4500, 3000)["ppid"] == 4000


def test_everything_dies_with_the_daemon(tmp_path: Path) -> None:
    code = (
        "import signal\n"
        "from engine.jobspace import JobSpace\n"
        "space = JobSpace.start(range(100000, 101000))\n"
        "print(space.init, flush=True)\n"
        "signal.pause()\n"
    )
    top = Path(jobspace.__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=top) as daemon:
        assert daemon.stdout is not None
        init = int(daemon.stdout.readline())
        handle = os.pidfd_open(init)
        try:
            daemon.kill()
            assert select.select([handle], [], [], 60)[0]
        finally:
            os.close(handle)


def test_everything_dies_when_the_reports_are_not_wanted_any_more(space: JobSpace) -> None:
    space.reports.close()
    assert select.select([space.init_pidfd], [], [], 60)[0]


def test_pid_one_survives_what_jobs_send(space: JobSpace) -> None:
    code = "import os, signal\nfor n in range(1, 65):\n    if n not in (32, 33): os.kill(1, n)\n"
    reports = Reports(space)
    bear(space, 5000, 1, 5000, 5000, [sys.executable, "-c", code])
    assert reports.wait("the end", lambda report: report.pid == 5000).status == 0
    reports.wait("a signal", lambda report: report.kind == Kind.SIGNAL and report.status == signal.SIGHUP)
    assert not is_dead(space.init)


def test_start_reports_errors() -> None:
    libc = ctypes.CDLL(None)
    pid = os.fork()
    if not pid:  # without privileges
        libc.setresuid(65534, 65534, 65534)
        try:
            JobSpace.start(BLOCK)
        except OSError as error:
            os._exit(error.errno in (errno.EPERM, errno.EACCES))
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_signal_with_a_value_from_outside(space: JobSpace, tmp_path: Path) -> None:
    # From outside the sender's pid is 0; the value comes through.
    handle = os.pidfd_open(space.init)
    try:
        pidfd.queue(handle, 40, 12345, 77)
    finally:
        os.close(handle)
    report = Reports(space).wait("the signal", lambda report: report.kind == Kind.SIGNAL)
    assert (report.pid, report.status, report.value, report.sender, report.uid) == (1, 40, 12345, 0, 77)
