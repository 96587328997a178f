"""Victims, a zygote and a job namespace for the tests of the engine."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.jobspace import JobSpace
from engine.zygote import Zygote
from tests.building import build_victims
from tests.engine.moves import Mover, Victim, until

VICTIMS = Path(__file__).parent.parent / "victims"


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder of the compiled victims."""
    return build_victims()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """A zygote."""
    zygote = Zygote.start()
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def space() -> Iterator[JobSpace]:
    """A job namespace."""
    space = JobSpace.start(range(100_000, 110_000))
    yield space
    space.close()


@pytest.fixture
def mover(zygote: Zygote, space: JobSpace) -> Iterator[Mover]:
    """Moves processes; whatever a test leaves in the namespace is killed."""
    mover = Mover(zygote, space)
    yield mover
    mover.close()
    space.kill_all()
    # Zombies, too, have to be gone: the next test may want their pids.
    until(
        lambda: not [pid for pid in os.listdir(f"/proc/{space.init}/root/proc") if pid.isdigit() and pid != "1"],
        "the end of all jobs",
    )
    space.read_reports()


@pytest.fixture
def victim(programs: Path, tmp_path: Path, mover: Mover) -> Iterator[Callable[..., Victim]]:
    """Starts victims by name; all are ended."""
    started: list[Victim] = []

    def start(name: str, *arguments: str, **options: Any) -> Victim:
        started.append(Victim(programs / name, tmp_path, *arguments, **options))
        return started[-1]

    yield start
    mover.close()  # what a worker still holds could not be reaped
    for one in started:
        one.close()
