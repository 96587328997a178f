# SPDX-License-Identifier: GPL-2.0-or-later
"""A child elsewhere than its parent comes to lead a group or a session: so does what stands for it beside the parent.

The kernel tells nobody of setpgid and setsid, so such children are looked at here, where each has its pid.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bpfs.errors import BpfsError
from bpfs.procs.process import MASTER
from bpfs.wire import messages
from engine.linux.procfs import own_file

if TYPE_CHECKING:
    from bpfs.procs.away import Away
    from bpfs.procs.ghosts import Ghosts

_TIMEOUT = 10.0  # seconds for a node to answer


class Groups:
    """What parents on nodes have been told of their children elsewhere."""

    def __init__(self, ghosts: Ghosts) -> None:
        self._ghosts = ghosts
        self._told: dict[int, tuple[int, bool]] = {}  # child -> node of its parent; whether it leads a session

    def news(self, parent: Away) -> list[tuple[int, bool]]:
        """Children of a process on a node who lead a group now, or (True) a session. Costs some 10 us a child."""
        found = []
        for pid in parent.children:
            child = self._ghosts.stand_in(pid)
            if parent.proc.place == MASTER or (child is not None and child.proc.place == parent.proc.place):
                continue
            try:
                fields = Path(own_file(pid, "stat")).read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            group, session = int(fields[2]), int(fields[3])
            leads = (int(parent.proc.place), session == pid)
            if group == pid and self._told.get(pid) != leads:
                self._told[pid] = leads
                found.append((pid, session == pid))
        return found

    async def tell(self, parent: Away, pid: int, session: bool) -> None:
        """Has what stands for the child follow it."""
        async with parent.calm():
            try:
                await self._ghosts.signals.ask(parent.proc.place, messages.StandInLeads(pid, session))
            except BpfsError:
                self._told.pop(pid, None)  # it has moved, or its node has gone
                raise

    def forget(self, pid: int) -> None:
        """The child has been waited for."""
        self._told.pop(pid, None)
