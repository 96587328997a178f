"""What the master knows of one process of the cluster."""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NewType, Protocol

import trio

Pid = NewType("Pid", int)  # the cluster's pid: the one on the master

MASTER = -1  # node number of the master
MOVES_KEPT = 32  # places a process remembers, moves a node remembers
LANDING = 0.25  # seconds; from the end of a move's source to the master's word it takes one or two milliseconds


class ProcState(enum.Enum):
    """What a process is doing, as far as the cluster is concerned."""

    RUNNING = "running"  # lives at `place`; a job report or its ghost moves it on
    STOPPED = "stopped"  # stopped by job control at `place`; continued by SIGCONT
    MIGRATING = "migrating"  # a migration owns it; that migration alone moves it on
    ENDED = "ended"  # `status` is final; only open wait files still hold the object


class OnLoss(enum.Enum):
    """What becomes of a process whose node is lost."""

    KILL = "kill"  # its ghost ends as if by SIGKILL
    RESTART = "restart"  # it comes back from its last periodic checkpoint, on another node


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended: an exit code, or the signal that killed it."""

    code: int | None = None
    signal: int | None = None
    core: bool = False

    def __str__(self) -> str:
        return f"exit {self.code}" if self.signal is None else f"signal {self.signal}"


class Owed(Protocol):
    """Memory that has still to come to a process that runs: procs/lazy.py."""

    @property
    def progress(self) -> str:
        """How far it is, in words."""

    async def wait_whole(self) -> None:
        """Waits until all is there, or the process has ended."""

    async def settle(self) -> None:
        """The process has ended: finds out whether that was because of this, and says so in its `why`."""


@dataclass(frozen=True, slots=True)
class Stay:
    """One line of a process's history: where it went, when, and what the move cost."""

    node: int
    since: float  # seconds since the epoch
    freeze_ms: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Identity:
    """What the kernel knows a process by, the same wherever it runs (cluster pids)."""

    uid: int
    gid: int
    ppid: int
    pgid: int
    sid: int
    groups: frozenset[int]  # supplementary groups
    start: int  # clock ticks after boot: tells a process from another that got its pid later
    cmdline: bytes  # arguments, each ended by NUL, as in /proc/PID/cmdline
    kernel: bool = False  # a thread of the kernel


@dataclass(slots=True, eq=False)
class Process:
    """A process that is, was, or is about to be on a node."""

    pid: Pid
    identity: Identity
    place: int = MASTER
    state: ProcState = ProcState.RUNNING
    before: ProcState = ProcState.RUNNING  # where a migration owns it: what it does otherwise
    hostpid: int = 0  # what the node's engine calls it; 0: not known
    native: bool = False  # forked where it is: there its parent alone hears of its end
    leaving: bool = False  # its copy on the node is being ended after a move: that death is not its own
    pledged: bool = False  # it will not run on where it is, should its engine die: a stop there is not its own
    unclaimed: ExitStatus | None = None  # such a death, while it is not known yet whether it was not
    source_lost: bool = False  # the node it was to move from has died, while a migration owned it
    progress: str = ""  # where a migration is, in words
    copying: str = ""  # likewise, while its memory goes ahead and it runs on, as if nothing moved it
    landing: bool = False  # its outcome is a moment away, and the process itself may know it before the master
    owed: Owed | None = None  # it runs, and has not got all of its memory yet
    why: str = ""  # it was killed, in words; empty: there is no more to say than its status
    onloss: OnLoss = OnLoss.KILL
    wants_strict: bool = False  # it, or who forked it, was moved so; until it comes home
    strict: bool = False  # it runs under the filter of strict jobs (engine/strict.py)
    busy: str = ""  # what keeps it from moving just now: a checkpoint, or a move that copies ahead
    status: ExitStatus | None = None
    doom: ExitStatus | None = None  # it ended, or is to end, while a migration owns it; the migration sees to that
    history: list[Stay] = field(default_factory=list)
    ended: trio.Event = field(default_factory=trio.Event)
    settled: trio.Event = field(default_factory=trio.Event)  # of the migration under way; replaced by each
    moved: Callable[[Process, int], None] | None = None  # told of a change of place, and of the one before

    @property
    def away(self) -> bool:
        """Whether it lives on a node, behind a ghost."""
        return self.place != MASTER

    def __post_init__(self) -> None:
        self.history.append(Stay(self.place, time.time(), 0.0, 0))

    def put(self, node: int) -> None:
        """From now on it counts as being at `node`."""
        before, self.place = self.place, node
        if self.moved is not None:
            self.moved(self, before)

    def arrived(self, node: int, freeze_ms: float, sent: int) -> None:
        """Records that the process runs at `node` from now on."""
        self.put(node)
        self.native = False
        self.history.append(Stay(node, time.time(), freeze_ms, sent))
        del self.history[:-MOVES_KEPT]

    async def wait_landed(self) -> None:
        """Waits, for a moment at most, while a migration comes to its end: a script that has moved itself asks where it
        is."""
        if self.landing and self.state is ProcState.MIGRATING:
            with trio.move_on_after(LANDING):
                await self.settled.wait()

    async def wait_ended(self) -> ExitStatus:
        """Waits until it is known how the process ended."""
        await self.ended.wait()
        assert self.status is not None
        return self.status

    def end(self, status: ExitStatus) -> None:
        """Records how the process ended; the first word counts."""
        if self.status is None:
            self.status = status
            self.state = ProcState.ENDED
            self.ended.set()


@dataclass(frozen=True, slots=True)
class Move:
    """One line of nodes/N/migrate: how a move to that node went."""

    pid: int
    outcome: str  # "ok" or the errno's name
    reason: str
    freeze_ms: float
    total_ms: float
    bytes: int

    def __str__(self) -> str:
        times = f"freeze_ms={self.freeze_ms:.1f} total_ms={self.total_ms:.1f}"
        return f"{self.pid} {self.outcome} {times} bytes={self.bytes} {self.reason}".rstrip()


def move_log() -> deque[Move]:
    """An empty log of the last moves to a node."""
    return deque(maxlen=MOVES_KEPT)
