"""A move from node to node: the ghost stays, and only its stream changes."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

from bpfs.errors import BpfsError
from bpfs.procs.away import tell
from bpfs.procs.migration import Externals
from bpfs.procs.phases import Landing
from bpfs.procs.places import HANDLES, Engine, NodePlace
from bpfs.procs.process import Process
from bpfs.procs.stdio import External, detach, drop_files
from bpfs.procs.surroundings import Surroundings
from bpfs.procs.to_node import Relative, ToNode, relatives
from bpfs.procs.vanish import has_vanished, vanish, vanishing
from bpfs.wire.mux import Channel, ghost_table


class Hop(ToNode):
    """From one node to another, straight; the master only tells both what to do."""

    source: NodePlace

    def __init__(self, proc: Process, source: NodePlace, destination: NodePlace, around: Surroundings) -> None:
        self._away = around.ghosts.of(proc)
        super().__init__(proc, source, destination, around)
        self._held = False

    def expected_children(self) -> list[Relative]:
        return relatives(self._away.children)

    def quiet(self) -> AbstractAsyncContextManager[None]:
        return self._around.ghosts.awake(self._away)

    def channels(self, externals: Externals) -> list[Channel]:
        return self._away.stdio.regroup(externals)

    def lending(self, channels: list[Channel], own: Externals, lent: list[External]) -> list[Channel]:
        del channels
        return self._away.stdio.regroup([*own, *lent])

    def home_fds(self, channel: Channel) -> list[int]:
        return self._away.stdio.channels[channel.number].fds

    async def land(self, dst: Engine, summary: dict[str, Any]) -> Landing:
        process = summary["process"]
        await self._around.ghosts.families.settle(self._away, process["children"])
        await self._around.ghosts.belongs(self._away, process["pgid"], process["sid"], process["uid"])
        return await super().land(dst, summary)

    async def hold(self) -> None:
        self._held = True
        await self._away.ghost.hold()

    async def depart(self, src: Engine, go: bool) -> None:
        self._around.ghosts.reports.expect(self.proc, self.bound(), self._away.stdio)
        await vanish(self, src, go)

    def departure(self) -> dict[str, Any]:
        self._around.ghosts.reports.expect(self.proc, self.bound(), self._away.stdio)
        return vanishing(self)

    async def has_departed(self, error: BpfsError | None, whole: bool) -> bool:
        return await has_vanished(self, error, whole)

    async def departed(self) -> None:
        self._is_there()
        await self._around.ghosts.reports.catch_up(self.proc)

    async def arrived(self, reply: dict[str, Any]) -> None:
        assert self._attached is not None
        stdio, attached = self._away.stdio, self._attached
        await drop_files(self.source, stdio)
        stdio.files = dict(zip(reply["files"], reply[HANDLES], strict=True))
        old = stdio.stream
        stdio.stream, stdio.ends = attached.number, attached.ends
        await tell(self._away.ghost.stream(attached.connection, ghost_table(stdio.channels.values()), attached.number))
        await self._around.ghosts.families.parted(self._away, self.source.number)
        await self._around.ghosts.families.keep_children(self._away, [pid for pid, *_ in self.children], self.along)
        self._around.ghosts.nursery.start_soon(detach, self.source, old)  # nobody need wait for it

    async def lost(self) -> None:
        assert self._attached is not None
        self._attached.connection.close()
        await detach(self.source, self._away.stdio.stream)
        await detach(self.destination, self._attached.number)

    async def stay(self) -> None:
        self._around.ghosts.reports.expect_no_more(self.proc)
        await super().stay()
        if self._held:
            await tell(self._away.ghost.resume())
