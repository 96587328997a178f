"""System calls that the freeze interrupted: a sleeping process has to sleep out its time and must see no EINTR."""


from dataclasses import dataclass


from engine.linux.ptrace import Registers


@dataclass(slots=True)
class Sleep:
    """What a thread slept in before the freeze."""

    number: int
    started: float  # time.monotonic() when it went to sleep


def look_at_sleep(pid: int, tid: int) -> Sleep | None:
    """Before the freeze."""
    return None


def resume_interrupted(registers: Registers, sleep: Sleep | None, frozen_at: float) -> None:
    """Adjust."""
    del registers, sleep, frozen_at


def prime_of(frozen: object, thread: object, registers: Registers) -> list[int]:
    """Todo."""
    return []


def prime(injection: object, plan: list[int], elapsed: float) -> None:
    """Todo."""
