"""A job space with clocks of its own: what a moved process reads there, and that nothing of its waits is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bpfs.slave.clocks import ahead
from bpfs.wire.messages import Welcome
from engine.descriptors.model import boot_id
from engine.jobspace import Clocks, JobSpace
from engine.zygote import Zygote
from tests.engine.moves import Mover, Victim
from tests.engine.test_moves import CLD_EXITED, ended

AHEAD = Clocks(1_000_000_000_000, 5_000_000_000_123)


@pytest.fixture(scope="module")
def later() -> Iterator[JobSpace]:
    """A job space of a master that booted earlier than this machine."""
    space = JobSpace.start(range(130_000, 140_000), clocks=AHEAD)
    if not space.has_clocks:
        pytest.skip("the kernel has no time namespaces")
    yield space
    space.close()


# Counts on: the clocks it reads by the vDSO and by system calls (time.sleep is clock_nanosleep with an absolute time).
READER = """
import os, sys, time
clocks = {name: getattr(time, "CLOCK_" + name) for name in ("MONOTONIC", "BOOTTIME", "MONOTONIC_RAW", "REALTIME")}
last = {name: time.clock_gettime_ns(clock) for name, clock in clocks.items()}
open(sys.argv[1] + ".ready", "w").close()
while not os.path.exists(sys.argv[1]):
    for name, clock in clocks.items():
        now = time.clock_gettime_ns(clock)
        assert now >= last[name], (name, last[name], now)
        last[name] = now
    time.sleep(0.001)
print(*(time.clock_gettime_ns(clocks[name]) for name in ("MONOTONIC", "BOOTTIME")), time.monotonic_ns())
"""


def test_a_process_reads_the_clocks_of_its_new_place(
    zygote: Zygote, later: JobSpace, mover: Mover, tmp_path: Path
) -> None:
    there = Mover(zygote, later)
    stop = tmp_path / "stop"
    one = Victim(Path("/usr/bin/python3"), tmp_path, command=["/usr/bin/python3", "-c", READER, str(stop)])
    try:
        mover.away(one.pid, one.output.fileno(), to=there)
        before = Clocks.now()
        one.stop()
        assert ended(there, one.pid) == (CLD_EXITED, 0), one.text()
        after = Clocks.now()
        monotonic, boottime, _ = map(int, one.text().split())
        assert before.monotonic + AHEAD.monotonic <= monotonic <= after.monotonic + AHEAD.monotonic
        assert before.boottime + AHEAD.boottime <= boottime <= after.boottime + AHEAD.boottime
    finally:
        there.close()
        one.close()


@pytest.mark.parametrize("name", ["state", "signals"])
def test_timers_go_on(zygote: Zygote, later: JobSpace, victim: Callable[..., Victim], name: str) -> None:
    one = victim(name, *(["root"] if name == "state" else []))
    there = Mover(zygote, later)
    there.away(one.pid, one.output.fileno())
    one.stop()
    assert ended(there, one.pid) == (CLD_EXITED, 0), one.text()
    there.close()


def test_clocks_of_the_same_machine_are_left_alone(space: JobSpace) -> None:
    assert not space.has_clocks
    welcome = Welcome(0, 1.0, 1.0, 1, 2, "/bpfs", bytes(16), boot_id(), 1, 2, "wait", 30.0)
    assert ahead(welcome, Clocks.now()) is None


def test_how_far_a_master_is_ahead() -> None:
    ours = Clocks.now()
    moved_on = (ours.monotonic + 5_000, ours.boottime - 7_000)
    welcome = Welcome(0, 1.0, 1.0, 1, 2, "/bpfs", bytes(16), bytes(16), *moved_on, "wait", 30.0)
    found = ahead(welcome, ours)
    assert found is not None
    late = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - ours.monotonic
    assert 5_000 - late <= found.monotonic <= 5_000
    assert -7_000 - late - 1_000_000 <= found.boottime <= -7_000
    assert Clocks(-1, 1_500_000_000).offsets() == "monotonic -1 999999999\nboottime 1 500000000\n"
