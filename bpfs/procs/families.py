"""Processes that are away, and their children, wherever these are: who hears of whom, and who has been waited for."""

from __future__ import annotations

import errno
import os
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

import trio

from bpfs.errors import BpfsError
from bpfs.nodes.registry import MASTER
from bpfs.procs import ghost as control
from bpfs.procs.away import BORN_WITHIN, Away, tell
from bpfs.procs.groups import Groups
from bpfs.procs.ledger import Part
from bpfs.procs.parents import Parents
from bpfs.wire import messages

if TYPE_CHECKING:
    from bpfs.procs.ghosts import Ghosts


class Families:
    """Of all ghosts of a master."""

    def __init__(self, ghosts: Ghosts) -> None:
        self._ghosts = ghosts
        self.orphans = Parents(ghosts)
        self.groups = Groups(ghosts)
        self.heard: dict[int, int] = {}
        """SIGCONTs from its stand-in, of who is a child elsewhere."""
        self.parents: dict[int, int] = {}
        """Child -> the process whose ghost has it (or its ghost) as a child, until that process has waited for it."""

    def has_child(self, away: Away, pid: int) -> None:
        """A process, or its ghost, is a child of this ghost."""
        self.parents[pid] = away.proc.pid
        away.children.add(pid)
        self._ghosts.ledger.put(Part.CHILD, pid, int(away.proc.pid))

    async def waited_for(self, away: Away, pid: int) -> None:
        """The process has waited for a child: so does its ghost."""
        self.parents.pop(pid, None)
        self.groups.forget(pid)
        away.children.discard(pid)
        self._ghosts.ledger.drop(Part.CHILD, pid)
        await tell(away.ghost.reap(pid))

    async def settle(self, away: Away, relatives: Sequence[Sequence[int]]) -> None:
        """The process stands still on its node, and has these children: it has waited for all others.

        Args:
            relatives: of the engine's summary; pids come first.

        Raises:
            BpfsError: EOPNOTSUPP, it would not hear any more what its parent or a child does.
        """
        children = {int(pid) for pid, *_ in relatives}
        with trio.move_on_after(BORN_WITHIN):
            while not children <= away.children:
                await trio.sleep(BORN_WITHIN / 100)
        if lost := sorted(children - away.children):
            raise BpfsError(errno.EOPNOTSUPP, f"its child {lost[0]} has no ghost on the master")
        for pid in away.children - children:
            await self.waited_for(away, pid)
        parent = self._ghosts.stand_in(away.proc.identity.ppid)
        if parent is not None and parent.proc.place == away.proc.place and away.proc.pid not in parent.children:
            raise BpfsError(errno.EOPNOTSUPP, f"the ghost of its parent {parent.proc.pid} cannot wait for its own")

    async def parted(self, away: Away, place: int) -> None:
        """The process has left a node, where children and parent of it may be: they hear of each other from afar."""
        for pid in away.children:
            child = self._ghosts.stand_in(pid)
            if child is not None and child.proc.place == place:
                child.proc.native = False
                self._ghosts.note(child)
                self.orphans.watch(child.proc)
        self.orphans.watch(away.proc)
        parent = self._ghosts.stand_in(self.parents.get(away.proc.pid, 0))
        if parent is not None and parent.proc.away:
            await tell(parent.ghost.keep([away.proc.pid], also=True))

    def forget(self, away: Away) -> None:
        for pid in away.children:
            self.groups.forget(pid)
            if self.parents.get(pid) == away.proc.pid:
                del self.parents[pid]
                self._ghosts.ledger.drop(Part.CHILD, pid)

    async def keep_children(self, away: Away, children: list[int], along: Container[int] = ()) -> None:
        """The process is on a node, and these children of it are here: what stands for them there follows them.

        Args:
            along: processes that move with it: nothing has to stand for these.
        """
        for child in children:
            self.has_child(away, child)
        if elsewhere := [child for child in children if child not in along]:
            await tell(away.ghost.keep(elsewhere))

    async def changed(self, away: Away, child: control.Child) -> None:
        async with away.calm():
            if away.proc.place == MASTER:
                return  # it has come home, and waits for it natively
            itself = self._ghosts.stand_in(child.pid)
            if itself is not None and itself.proc.place == away.proc.place:
                return  # they are together, and need nobody between them
            heard = itself.stopped_after if itself is not None else self.heard.get(child.pid, 0)
            if child.code not in (os.CLD_STOPPED, os.CLD_CONTINUED):
                self.heard.pop(child.pid, None)
            message = messages.StandIn(child.pid, child.code, child.status, heard)
            await self._ghosts.signals.ask(away.proc.place, message)
