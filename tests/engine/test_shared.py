"""Shared memory without a name, mappings by the thousand, reservations of terabytes: there, on, and back."""

from collections.abc import Callable, Iterator

import pytest

from engine.jobspace import JobSpace
from engine.zygote import Zygote
from tests.engine.moves import Mover, Refused, Victim
from tests.engine.test_moves import CLD_EXITED, ended


@pytest.fixture
def other(zygote: Zygote) -> Iterator[Mover]:
    """Another node."""
    space = JobSpace.start(range(140_000, 150_000))
    mover = Mover(zygote, space)
    yield mover
    mover.close()
    space.close()


@pytest.mark.parametrize("more", [[], ["many"]], ids=["objects", "ten thousand mappings"])
def test_all_of_it_moves_on(mover: Mover, other: Mover, victim: Callable[..., Victim], more: list[str]) -> None:
    one = victim("shared", *more)
    at = mover.away(one.pid, one.output.fileno())
    at = mover.away(at, one.output.fileno(), to=other)
    mover.space.read_reports()
    other.away(at, one.output.fileno(), to=mover)
    mover.space.read_reports()
    one.stop()
    assert ended(mover, one.pid) == (CLD_EXITED, 0), one.text()


def test_memory_that_another_process_has_stays(mover: Mover, victim: Callable[..., Victim]) -> None:
    one = victim("obstacle", "memfd")
    with pytest.raises(Refused) as refused:
        mover.away(one.pid, one.output.fileno())
    assert any("which another process has open" in line for line in refused.value.refusals), refused.value.refusals
    one.stop()
    assert one.process.wait() == 0, one.text()
