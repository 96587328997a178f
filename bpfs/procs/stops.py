"""Ghosts that SIGSTOP has stopped, which no program can catch: so are their processes. And those that are traced."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import trio

from bpfs.procs.away import SI_USER, Away, carefully
from bpfs.procs.debuggers import Debuggers
from bpfs.procs.process import ProcState
from bpfs.wire import messages

if TYPE_CHECKING:
    from bpfs.procs.ghosts import Ghosts

POLL = 0.25  # seconds between looks


class Stops:
    """Looks at all ghosts of a master."""

    def __init__(self, ghosts: Ghosts) -> None:
        self._ghosts = ghosts
        self.debuggers = Debuggers()
        self.some = trio.Event()
        """There is a ghost."""
        ghosts.nursery.start_soon(self._watch, name="stops of ghosts")

    async def _watch(self) -> None:
        while True:
            if not len(self._ghosts):
                self.some = trio.Event()
                await self.some.wait()
            await trio.sleep(POLL)
            for away in list(self._ghosts.all()):
                if not (away.ghost.gone or away.asked_stop or away.proc.state is not ProcState.RUNNING):
                    self._look(away)

    def _look(self, away: Away) -> None:
        groups, start_soon = self._ghosts.families.groups, self._ghosts.nursery.start_soon
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
