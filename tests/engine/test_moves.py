"""One process goes into a job namespace; there it checks itself."""

import os
import signal
from collections.abc import Callable

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


@pytest.mark.parametrize("name", ["memory", "memory-static", "signals", "signals-static"])
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
