"""What the master holds for a process that is on a node."""

from __future__ import annotations

import math
import signal
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.procs.entries import Bound
from bpfs.procs.ghost import Ghost, NoGhost
from bpfs.procs.process import Process
from bpfs.procs.stdio import Stdio

NODE_TIMEOUT = 30.0  # seconds for a node to carry out a signal
BORN_WITHIN = 1.0  # seconds that the ghost of a child may take that its parent has just made
SI_USER = 0
SI_QUEUE = -1
SI_TKILL = -6
SI_KERNEL = 0x80
UNCOUNTED = (1 << 31) - 1  # any number of SIGCONTs: an earlier master was told of them

_log = log.get("procs")


@dataclass(slots=True, eq=False)
class Away:
    """A process on a node, with all that the master holds for it.

    Attributes:
        quiet: held while a migration moves the process: signals wait that long.
        known: an earlier master's is waited for as well, until its node is back, or known to be lost.
        children: what its ghost has as children here, until the process has waited for them.
        continuing: SIGCONTs on their way to the node: stops that are reported before its answer were before them.
        asked_stop: the ghost was told to stop, or its being stopped has been passed on.
        stopped_by: the signal that its process was stopped by last.
        stopped_after: how many SIGCONTs to its stand-in had been passed on then.
        awake: its ghost has to answer: stops wait until that is over.
        to_stop: one does.
        orphaned: when its parent, which was on the same node, ended there, by trio's clock.
        bound: where it may run by now, while that is not known.
    """

    proc: Process
    ghost: Ghost
    stdio: Stdio
    quiet: trio.Lock = field(default_factory=trio.Lock)
    known: trio.Event | None = None
    asked_stop: bool = False
    stopped_by: int = signal.SIGSTOP
    stopped_after: int = 0
    retired: bool = False
    awake: bool = False
    to_stop: bool = False
    continuing: set[object] = field(default_factory=set)
    children: set[int] = field(default_factory=set)
    orphaned: float = -math.inf
    bound: Bound | None = None

    @asynccontextmanager
    async def calm(self) -> AsyncIterator[None]:
        """In this context the process is where it is, and can be told things there."""
        if self.known is not None:
            await self.known.wait()
        async with self.quiet:
            yield

    @property
    def real(self) -> bool:
        """Whether there is a ghost."""
        return not isinstance(self.ghost, NoGhost)


async def carefully(pid: int, work: Awaitable[object]) -> None:
    """Does something for one process. Its trouble must not end the master, and every other process with it."""
    try:
        await work
    except BpfsError as error:
        _log.warning("process %d: %s", pid, error)
    except Exception as error:
        _log.error("process %d: failed in an unforeseen way", pid, exc_info=error)


async def tell(sending: Awaitable[None]) -> None:
    """Waits for a packet to a ghost to be sent; a ghost that is gone is no error here."""
    try:
        await sending
    except BpfsError as error:
        _log.info("%s", error)  # it was killed just now: its own Gone event deals with that
