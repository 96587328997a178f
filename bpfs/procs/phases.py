"""The phases of a move, what it costs, and where it lands."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field

from bpfs.procs import faults


class Phase(enum.Enum):
    """Where a migration is, in the words of procs/PID/state."""

    PREPARE = "prepare"  # the destination makes an empty process with the pid
    PRECOPY = "precopy"  # memory goes ahead, round by round, while the process runs; only of large ones
    ATTACH = "attach"  # ends of stdio at the destination are made, beside prepare; anew where the freeze shows others
    GATHER = "gather"  # the destination fetches the files that it maps, where its node keeps only what it needs
    FREEZE = "freeze"  # the source stops, all threads; its own write is answered
    INSPECT = "inspect"  # what cannot move is refused here; nothing has been touched yet
    TRANSFER = "transfer"  # the image goes from source to destination, which rebuilds the process, stopped
    DEPART = "depart"  # the source goes: into the ghost, or killed. From its end on the new place is the place
    RESUME = "resume"  # the destination lets its copy run


@dataclass(slots=True)
class Figures:
    """What a move cost."""

    began: float  # time.perf_counter()
    frozen: float = 0.0
    whole: float = 0.0
    running: float = 0.0
    stood_for: float = 0.0  # seconds from the stop to a whole copy, as the source's engine counts them
    ran_after: float = 0.0  # and from there to the copy's first step, as the destination's does
    bytes: int = 0

    @property
    def freeze_ms(self) -> float:
        """Milliseconds during which no copy ran; 0 for a move that did not come about.

        A sum of what each machine sees by itself, so that no clocks are compared. The time that the word of the whole
        copy takes from one to the other is in both.
        """
        if not self.frozen or not self.running:
            return 0.0
        return ((self.stood_for + self.ran_after) if self.ran_after else self.running - self.frozen) * 1e3

    @property
    def total_ms(self) -> float:
        """Milliseconds from the request to the process running at its new place (or to now)."""
        return ((self.running or time.perf_counter()) - self.began) * 1e3


@dataclass(slots=True)
class Landing:
    """Where the destination's engine waits for the image, and the descriptors it needs for it.

    Attributes:
        fds: of the destination, for its operation receive.
        externals: on a node: key of an external -> index into `fds`.
        ghost_fds: at home: key of an external -> its number in the ghost.
    """

    host: str
    port: int
    token: bytes
    fds: list[int] = field(default_factory=list)
    externals: dict[int, int] = field(default_factory=dict)
    ghost_fds: dict[int, int] = field(default_factory=dict)


def is_watched_closely() -> bool:
    """Whether a test holds one of the phases that are ours to tell apart only where we take part in them."""
    return any(faults.is_held(phase.value) for phase in Phase if phase not in (Phase.PREPARE, Phase.ATTACH))
