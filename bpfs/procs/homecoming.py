"""A move home: the process is rebuilt inside its ghost, which so becomes the process again."""

from __future__ import annotations

import errno
from contextlib import AbstractAsyncContextManager
from typing import Any

from bpfs.errors import BpfsError
from bpfs.pidspace import BLOCK_BASE
from bpfs.procs.away import tell
from bpfs.procs.company import Company
from bpfs.procs.migration import Look, Migration
from bpfs.procs.phases import Landing, Phase
from bpfs.procs.places import Engine, NodePlace, Place
from bpfs.procs.process import Process, ProcState
from bpfs.procs.stdio import detach, drop_files
from bpfs.procs.surroundings import Surroundings
from bpfs.procs.vanish import has_vanished, vanish, vanishing


class Return(Migration):
    """Home, into the ghost."""

    source: NodePlace

    def __init__(self, proc: Process, source: NodePlace, destination: Place, around: Surroundings) -> None:
        super().__init__(proc, source, destination)
        self._around = around
        self._away = around.ghosts.of(proc)
        self._held = False
        self._ghost_fds: dict[int, int] = {}
        self._has_tids_of_nodes = False

    def quiet(self) -> AbstractAsyncContextManager[None]:
        return self._around.ghosts.awake(self._away)

    async def make_ready(self, dst: Engine, look: Look) -> None:
        address = self.destination.address(self.source)
        reply = await dst.call("listen", address=address)
        self.landing = Landing(address, reply["port"], reply["token"])

    async def stage(self, dst: Engine) -> tuple[Landing, dict[str, Any]]:
        # Into the ghost, which goes on with its work.
        assert self.landing is not None
        return self.landing, {"ghost": self.proc.pid}

    async def receive(self, dst: Engine, landing: Landing, **more: Any) -> dict[str, Any]:
        reply = await super().receive(dst, landing, part=self._has_tids_of_nodes, **more)
        if self._has_tids_of_nodes:
            # Threads that it has made on a node keep their ids, which the kernel does not give away here. Nobody else
            # can make a process with such an id meanwhile: not before all of the memory has come.
            try:
                async with self._around.blocks.raised():
                    await dst.call("complete")
            except BpfsError as error:
                await dst.call("discard", errno=error.code, text=error.sentence)
                raise
        return reply

    async def land(self, dst: Engine, summary: dict[str, Any]) -> Landing:
        await self._enter(Phase.ATTACH)
        away = self._away
        process = summary["process"]
        self._has_tids_of_nodes = process["highest_tid"] >= BLOCK_BASE
        self.goes_straight = not self._has_tids_of_nodes
        await self._around.ghosts.families.settle(away, process["children"])
        await self._around.ghosts.belongs(away, process["pgid"], process["sid"], process["uid"])
        externals = summary["externals"]
        if self.company is not None:
            externals = await self.company.tell(self.proc.pid, externals)
            await self._borrow(self.company)
        self._ghost_fds = away.stdio.home_numbers(away.stdio.regroup(externals))
        self._held = True
        held = await away.ghost.hold(home=True)
        if held.pumps:
            await away.ghost.pump()
        # Not before the ghost has answered: the engine stops it.
        address = self.destination.address(self.source)
        reply = await dst.call(
            "prepare", pid=self.proc.pid, ppid=0, pgid=0, sid=0,
            place=self.destination.target(self.proc.pid), address=address, lazy=self.keep is not None,
        )  # fmt: skip
        return Landing(address, reply["port"], reply["token"], ghost_fds=self._ghost_fds)

    async def _borrow(self, company: Company) -> None:
        """What was opened by another of its company is in that one's ghost."""
        numbers = {}
        for one in company.borrowed(self.proc.pid):
            owner = self._around.ghosts.stand_in(one.owner)
            if owner is None:
                raise BpfsError(errno.ESRCH, f"the ghost of process {one.owner} has ended")
            numbers[one.key] = one.owner, owner.stdio.home_number(one.external)
            self.borrowed[int(one.external["key"])] = one.key
        await company.take_home(self.proc.pid, numbers)

    async def depart(self, src: Engine, go: bool) -> None:
        # From the engine's word on, the end of the ghost's control socket will mean that it is the process again.
        self._away.retired = True
        await vanish(self, src, go)

    def departure(self) -> dict[str, Any]:
        self._away.retired = True
        return vanishing(self)

    async def has_departed(self, error: BpfsError | None, whole: bool) -> bool:
        return await has_vanished(self, error, whole)

    async def departed(self) -> None:
        self.proc.put(self.destination.number)
        self.proc.wants_strict = self.proc.strict = False

    async def lost(self) -> None:
        self._away.retired = False
        await detach(self.source, self._away.stdio.stream)

    async def arrived(self, reply: dict[str, Any]) -> None:
        self.before = ProcState.RUNNING
        await self._around.ghosts.families.parted(self._away, self.source.number)
        self._around.ghosts.retire(self._away)
        await drop_files(self.source, self._away.stdio)
        self._around.ghosts.nursery.start_soon(detach, self.source, self._away.stdio.stream)  # nobody need wait for it

    async def stay(self) -> None:
        if self._away.retired:
            self._away.retired = False
            await self._around.ghosts.look_after(self._away)
        # A ghost whose memory had been given up already starts anew, and is dealt with when it says so (Ghosts).
        if self._held:
            await tell(self._away.ghost.resume())
