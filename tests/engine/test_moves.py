"""One process goes into a job namespace; there it checks itself."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.jobspace import Kind
from tests.engine.moves import Mover, Victim, until

CLD_EXITED = 1


def ended(mover: Mover, pid: int) -> tuple[int, int]:
    """Wait for the end of a job; (code, status) as waitid gives them."""

    def look() -> tuple[int, int] | None:
        for report in mover.space.read_reports():
            if report.kind == Kind.CHILD and report.pid == pid and report.code <= 3:
                return report.code, report.status
        return None

    result: tuple[int, int] = until(look, f"the end of process {pid}")
    return result


@pytest.mark.parametrize("name", ["memory", "memory-static", "signals", "signals-static", "robust", "leaves"])
def test_victim_finds_everything_after_the_move(mover: Mover, victim: Callable[..., Victim], name: str) -> None:
    one = victim(name)
    mover.away(one.pid, one.output.fileno())
    assert one.process.wait() == -signal.SIGKILL
    one.stop()
    assert ended(mover, one.pid) == (CLD_EXITED, 0), one.text()


def test_process_that_handles_all_of_our_stop_signals(mover: Mover, victim: Callable[..., Victim]) -> None:
    one = victim("signals", "all")
    mover.away(one.pid, one.output.fileno())
    one.stop()
    assert ended(mover, one.pid) == (CLD_EXITED, 0), one.text()


def test_vector_registers(mover: Mover, victim: Callable[..., Victim]) -> None:
    one = victim("fpu")
    hostpid = mover.away(one.pid, one.output.fileno())
    os.kill(hostpid, signal.SIGUSR1)
    assert ended(mover, one.pid) == (CLD_EXITED, 0), one.text()


@pytest.mark.parametrize("who", ["root", "user"])
def test_rights_names_limits_and_timers(mover: Mover, victim: Callable[..., Victim], tmp_path: Path, who: str) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o777)
    one = victim("state", who)
    mover.away(one.pid, one.output.fileno())
    one.stop()
    assert ended(mover, one.pid) == (CLD_EXITED, 0), one.text()


def test_stopped_process_stays_stopped(mover: Mover, victim: Callable[..., Victim]) -> None:
    one = victim("memory")
    os.kill(one.pid, signal.SIGSTOP)
    until(lambda: state_of(one.pid) == "T", "the stop")
    hostpid = mover.away(one.pid, one.output.fileno())
    until(lambda: state_of(hostpid) == "T", "the stop there")
    one.stop()
    os.kill(hostpid, signal.SIGCONT)
    assert ended(mover, one.pid) == (CLD_EXITED, 0), one.text()


def test_stopped_process_stays_stopped_when_released(mover: Mover, victim: Callable[..., Victim]) -> None:
    one = victim("memory")
    os.kill(one.pid, signal.SIGSTOP)
    until(lambda: state_of(one.pid) == "T", "the stop")
    source = mover.worker()
    source.ask("freeze", pid=one.pid, writing=False)
    assert source.ask("inspect")["process"]["stopped"]
    source.ask("release")
    until(lambda: state_of(one.pid) == "T", "the stop again")
    os.kill(one.pid, signal.SIGCONT)
    one.stop()
    assert one.process.wait() == 0, one.text()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


PYTHON = """
import hashlib, json, os, sys, time
open(sys.argv[1] + ".ready", "w")
x = [0] * 50000
d = {i: str(i) for i in range(20000)}
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
assert d[777] == "777" and len(x) == 50000 and hashlib.sha256(json.dumps(list(d)).encode()).digest()
"""
PERL = """
open(F, ">", "$ARGV[0].ready"); close F;
my %h = map { $_ => $_ * 2 } 1..20000;
select(undef, undef, undef, 0.01) until -e $ARGV[0];
exit($h{777} == 1554 ? 0 : 1)
"""
BASH = """
exec 3<>/dev/null
trap "x=1" USR1
>"$0.ready"
until [ -e "$0" ]; do read -t 0.01 <&3; done
a=$(echo hello | tr a-z A-Z)
[ "$a" = HELLO ]
"""


@pytest.mark.parametrize(
    "command",
    [["python3", "-c", PYTHON], ["perl", "-e", PERL], ["bash", "-c", BASH]],
    ids=["python3", "perl", "bash"],
)
def test_real_programs(mover: Mover, tmp_path: Path, command: list[str]) -> None:
    stop = tmp_path / "stop"
    program = Path(shutil.which(command[0]) or command[0])
    one = Victim(program, tmp_path, command=[*command, str(stop)])
    try:
        until(lambda: not Path(f"/proc/{one.pid}/task/{one.pid}/children").read_text(), "no children")
        mover.away(one.pid, one.output.fileno())
        one.stop()
        assert ended(mover, one.pid) == (CLD_EXITED, 0), one.text()
    finally:
        one.close()
