"""A move from the master to a node: the process turns into its ghost."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import trio

from bpfs.errors import BpfsError, EngineRefused
from bpfs.procs.away import tell
from bpfs.procs.ghost import Ghost
from bpfs.procs.migration import Externals
from bpfs.procs.phases import Landing
from bpfs.procs.places import HANDLES, Engine, NodePlace, Place
from bpfs.procs.process import Process, ProcState
from bpfs.procs.stdio import External, Stdio
from bpfs.procs.surroundings import Surroundings
from bpfs.procs.table import read_identity
from bpfs.procs.to_node import Relative, ToNode, relatives
from bpfs.wire.mux import Channel, ghost_table
from engine.linux import procfs

UNTRACED_WITHIN = 10.0  # seconds in which a dying engine lets go of a process


class Leave(ToNode):
    """From the master to a node."""

    def __init__(self, proc: Process, source: Place, destination: NodePlace, around: Surroundings) -> None:
        super().__init__(proc, source, destination, around)
        self.looking["at_home"] = True
        self.ghost_environment = around.environment
        self._stdio = Stdio()
        self._program = -1  # of the ghost to be
        self._halted = False  # it is stopped, and its process is not
        self._control: tuple[socket.socket, socket.socket] | None = None  # of the ghost to be: our end and its own

    def expected_children(self) -> list[Relative]:
        return relatives(procfs.children(self.proc.pid))

    def channels(self, externals: Externals) -> list[Channel]:
        self._stdio = Stdio.of(externals)
        return list(self._stdio.channels.values())

    def lending(self, channels: list[Channel], own: Externals, lent: list[External]) -> list[Channel]:
        assert self.company is not None
        result = []
        for channel in channels:
            mine = {self.company.description(self.proc.pid, external) for external in channel.externals}
            more = [one for one in lent if self.company.description_of(int(one["key"])) in mine]
            result.append(replace(channel, externals=(*channel.externals, *more)))
        return result

    def rename(self, renamed: Mapping[int, External]) -> None:
        for number, channel in self._stdio.channels.items():
            externals = tuple(renamed[external["key"]] for external in channel.externals)
            self._stdio.channels[number] = replace(channel, externals=externals)

    goes_at_once = True

    def foresees(self) -> bool:
        process = self.looked["process"]
        if not super().foresees() or self._birth() != tuple(process[name] for name in ("uid", "ppid", "pgid", "sid")):
            return False
        self._make_ghost_ready(process)
        return True

    def ghost_fds(self) -> list[int]:
        for end in self._control or ():
            end.close()
        self._control = Ghost.pair()
        return [self._program, self._control[1].fileno()]

    async def land(self, dst: Engine, summary: dict[str, Any]) -> Landing:
        if self.watched:  # it has been running for a while
            self.proc.identity = read_identity(self.proc.pid)
        landing = await super().land(dst, summary)
        self._make_ghost_ready(summary["process"])
        return landing

    async def land_anew(self, dst: Engine, summary: dict[str, Any]) -> Landing:
        self.proc.identity = read_identity(self.proc.pid)
        return await super().land_anew(dst, summary)

    def _make_ghost_ready(self, process: dict[str, Any]) -> None:
        if process["stopped"]:
            self.before = ProcState.STOPPED  # at home the kernel's word is enough
        self._stdio.comm = os.fsencode(process["comm"])
        identity = self.proc.identity
        if not identity.cmdline:  # it was in the middle of an exec
            with suppress(OSError):
                cmdline = procfs.read(f"/proc/{self.proc.pid}/cmdline")
                self.proc.identity = replace(identity, cmdline=cmdline)
        self._program = self._around.programs.descriptor(self.proc.pid, int(process["euid"]), int(process["rights"]))

    async def depart(self, src: Engine, go: bool) -> None:
        self._around.ghosts.reports.expect(self.proc, self.bound(), self._stdio)
        try:
            await src.call("become_ghost", go=go)
        except BpfsError as error:
            if await self.has_departed(error, whole=True):
                return
            if self.company is None:
                raise
            await self._depart_anew(src if isinstance(error, EngineRefused) else None)

    async def _depart_anew(self, src: Engine | None) -> None:
        """All have agreed: it stands still, and becomes its ghost though its copy has died, or by another engine."""
        if src is not None:
            await src.call("become_ghost")
            return
        for end in self._control or ():
            end.close()
        async with self.source.engine() as engine:
            await engine.call("freeze", pid=self.proc.pid)
            await engine.call("inspect", **self.looking)
            await engine.call("become_ghost", self.ghost_fds(), env=self.ghost_environment)
        self._halted = self.before is not ProcState.STOPPED

    def departure(self) -> dict[str, Any]:
        self._around.ghosts.reports.expect(self.proc, self.bound(), self._stdio)
        return {"depart": "become_ghost"}

    async def has_departed(self, error: BpfsError | None, whole: bool) -> bool:
        # The worker may have died right after the exec, or be in it, unheard: what the process is then decides.
        if not isinstance(error, EngineRefused):
            await wait_untraced(self.proc.pid)
        return self._around.is_ghost(self.proc.pid)

    async def departed(self) -> None:
        assert self._attached is not None and self._control is not None
        ours, theirs = self._control
        theirs.close()
        attached, proc = self._attached, self.proc
        self._is_there()
        self._stdio.stream, self._stdio.ends = attached.number, attached.ends
        away = self._around.ghosts.adopt(proc, Ghost(proc.pid, ours), self._stdio)
        away.asked_stop = self.before is ProcState.STOPPED
        await tell(away.ghost.name(self._stdio.comm))
        await tell(away.ghost.stream(attached.connection, ghost_table(self._stdio.channels.values()), attached.number))
        await self._around.ghosts.families.keep_children(away, [pid for pid, *_ in self.children], self.along)
        if self._halted:
            await tell(away.ghost.cont())
        await self._around.ghosts.reports.catch_up(proc)

    async def arrived(self, reply: dict[str, Any]) -> None:
        self._stdio.files = dict(zip(reply["files"], reply[HANDLES], strict=True))

    async def stay(self) -> None:
        for end in self._control or ():
            end.close()
        self._around.ghosts.reports.expect_no_more(self.proc)
        await super().stay()


async def wait_untraced(pid: int) -> None:
    """Waits until a dying engine has let go of a process, as long as that may take."""
    with trio.move_on_after(UNTRACED_WITHIN):
        while _is_traced(pid):
            await trio.sleep(0.002)


def _is_traced(pid: int) -> bool:
    try:
        return procfs.parse_status(procfs.read(procfs.own_file(pid, "status")))["TracerPid"] != "0"
    except (OSError, KeyError):
        return False
