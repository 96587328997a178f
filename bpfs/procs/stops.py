"""Ghosts that SIGSTOP has stopped, which no program can catch: so are their processes. And those that are traced.

A ghost hears from the kernel that a child of it was stopped, and tells; the others have to be looked at.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import trio

from bpfs.procs.away import SI_USER, Away, carefully
from bpfs.procs.debuggers import Debuggers
from bpfs.procs.process import ProcState
from bpfs.wire import messages

if TYPE_CHECKING:
    from bpfs.procs.ghosts import Ghosts

POLL = 0.25  # seconds between looks at those of whom nobody tells
SHARE = 50  # looking at all takes at most one part in so many of a core
AT_ONCE = 32  # ghosts between two moments for everybody else


class Stops:
    """Looks at all ghosts of a master."""

    def __init__(self, ghosts: Ghosts) -> None:
        self._ghosts = ghosts
        self.debuggers = Debuggers()
        self.some = trio.Event()
        """There is a ghost."""
        self._below: set[Away] = set()  # have told of children
        ghosts.nursery.start_soon(self._watch, name="stops of ghosts")

    def look_below(self, parent: Away) -> None:
        """Some child's ghost is stopped."""
        self._below.add(parent)

    async def _watch(self) -> None:
        all_at, pause = -float("inf"), POLL
        while True:
            if not len(self._ghosts):
                self.some = trio.Event()
                await self.some.wait()
                pause = POLL
            await trio.sleep(pause)
            if trio.current_time() < all_at:
                pause = max(POLL, await self._look(self._urgent()) * SHARE)
            else:
                self._below.clear()
                took = await self._look(list(self._ghosts.all()), thoroughly=True)
                all_at = trio.current_time() + took * SHARE

    def _urgent(self) -> list[Away]:
        """Those of whom no ghost of a parent tells, and those of whom one just did."""
        ghosts, below = self._ghosts, self._below
        self._below = set()
        pids = ghosts.orphans()
        for parent in below:
            pids |= parent.children
        return [away for pid in pids if (away := ghosts.stand_in(pid)) is not None]

    async def _look(self, some: Iterable[Away], thoroughly: bool = False) -> float:
        """Returns the seconds of processor time that it took."""
        took, began = 0.0, time.thread_time()
        for count, away in enumerate(some, 1):
            if not (away.ghost.gone or away.asked_stop or away.proc.state is not ProcState.RUNNING):
                self._look_at(away, thoroughly)
            if count % AT_ONCE == 0:
                took += time.thread_time() - began
                await trio.lowlevel.checkpoint()
                began = time.thread_time()
        return took + time.thread_time() - began

    def _look_at(self, away: Away, thoroughly: bool) -> None:
        groups, start_soon = self._ghosts.families.groups, self._ghosts.nursery.start_soon
        if thoroughly:
            for child, session in groups.news(away):
                start_soon(carefully, child, groups.tell(away, child, session))
        state = away.ghost.state()
        if state == "t":
            self.debuggers.look(away.proc)
        elif state == "T":
            away.asked_stop = True
            start_soon(carefully, away.proc.pid, self._pass_on(away))

    async def _pass_on(self, away: Away) -> None:
        async with away.calm():
            # It may have been continued since, and that may have been passed on already.
            if away.ghost.state() == "T":
                stop = messages.Signal(away.proc.pid, signal.SIGSTOP, SI_USER, 0, 0, 0)
                await self._ghosts.signals.send_now(away.proc, stop)
            else:
                away.asked_stop = False
