"""Processes with several threads: away, and home again."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.zygote import Zygote
from tests.engine.moves import Mover, Victim
from tests.engine.test_deaths import assert_unharmed, kill_worker, maps, new_worker
from tests.engine.test_home import ghost_program, go_away
from tests.engine.test_moves import CLD_EXITED, ended


@pytest.mark.parametrize("count", [1, 10, 100])
def test_threads_go_on(mover: Mover, victim: Callable[..., Victim], count: int) -> None:
    one = victim("threads", str(count))
    mover.away(one.pid, one.output.fileno())
    assert one.process.wait() == -signal.SIGKILL
    one.stop()
    assert ended(mover, one.pid) == (CLD_EXITED, 0), one.text()


def test_threads_there_and_back(mover: Mover, victim: Callable[..., Victim], programs: Path) -> None:
    one = victim("threads", "4")
    program = ghost_program(programs)
    for _ in range(3):
        control, hostpid = go_away(mover, one, program)
        assert mover.home(hostpid, one.pid) == one.pid
        control.close()
    one.stop()
    assert one.process.wait() == 0, one.text()
    os.close(program)


def test_failed_home_coming_of_threads_leaves_a_ghost(
    mover: Mover, victim: Callable[..., Victim], programs: Path, zygote: Zygote
) -> None:
    one = victim("threads", "4")
    program = ghost_program(programs)
    control, hostpid = go_away(mover, one, program)
    for kill in (False, True):
        source = mover.worker()
        destination, pid = new_worker(mover)
        source.ask("freeze", pid=hostpid, writing=False)
        seen = source.ask("inspect")
        mover._transfer(source, destination, seen, {"ghost": one.pid}, {}, [])
        if kill:
            kill_worker(zygote, pid)
        else:
            destination.close()
        assert control.recv(64) == b"ghost"
        source.ask("release")
        source.close()
    assert mover.home(hostpid, one.pid) == one.pid
    one.stop()
    assert one.process.wait() == 0, one.text()
    os.close(program)
    control.close()


@pytest.mark.parametrize("phase", ["freeze", "sent"])
def test_source_worker_dies(mover: Mover, victim: Callable[..., Victim], zygote: Zygote, phase: str) -> None:
    one = victim("threads", "8")
    mappings = maps(one.pid)
    source, pid = new_worker(mover)
    source.ask("freeze", pid=one.pid, writing=False)
    if phase == "sent":
        seen = source.ask("inspect")
        mover._transfer(
            source, mover.worker(), seen, {"init": mover.space.init}, {e["key"]: 0 for e in seen["externals"]}, [0]
        )
    kill_worker(zygote, pid)
    assert_unharmed(one, mappings)
