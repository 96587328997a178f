"""A move to a node, wherever from: the process is born there under its placeholders, and its stdio is joined to it."""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

from bpfs.errors import BpfsError
from bpfs.procs.company import Company
from bpfs.procs.entries import Bound
from bpfs.procs.exchange import together
from bpfs.procs.migration import Externals, Look, Migration
from bpfs.procs.phases import Landing, Phase
from bpfs.procs.places import HANDLES, Engine, NodePlace, Place
from bpfs.procs.process import Process
from bpfs.procs.stdio import Attached, External, attach, detach
from bpfs.procs.surroundings import Surroundings
from bpfs.procs.terminal import foreground_group, on_terminal, session_of
from bpfs.wire.mux import ChanKind, Channel
from engine.facts import share_files
from engine.linux import procfs

Relative = tuple[int, int, int, int]
"""A child's pid, process group, session and real uid."""


class ToNode(Migration):
    """To a node, wherever from."""

    destination: NodePlace

    def __init__(self, proc: Process, source: Place, destination: NodePlace, around: Surroundings) -> None:
        super().__init__(proc, source, destination)
        self._around = around
        self._externals: Externals | None = None  # what `_attached` was made for
        self._attached: Attached | None = None
        self._session = 0  # whose controlling terminal it has open
        self._front = 0  # its group, where that is in the foreground there
        self._born_as: tuple[object, ...] = ()
        self.children = self.expected_children()  # have stand-ins over there
        self.gathers = not share_files(source.facts, destination.facts)

    def bound(self) -> Bound:
        """Where it is about to be; all is ready there."""
        assert self._attached is not None
        return Bound(self.destination.number, self._attached.number, self._attached.ends)

    @abstractmethod
    def expected_children(self) -> list[Relative]:
        """Its children, before it stands still."""

    @abstractmethod
    def channels(self, externals: Externals) -> list[Channel]:
        """The channels that these are. Raises BpfsError."""

    def terminal_of(self, channels: list[Channel]) -> tuple[int, int]:
        """The session whose controlling terminal is among these channels, 0 where none is; and the process's group,
        where that is in its foreground, else 0."""
        fds = next((self.home_fds(channel) for channel in channels if channel.kind is ChanKind.TTY), [])
        session = session_of(self.proc.pid, fds)
        return session, foreground_group(self.proc.pid) if session else 0

    @abstractmethod
    def lending(self, channels: list[Channel], own: Externals, lent: list[External]) -> list[Channel]:
        """Channels of its own externals, with those that others have of them."""

    def home_fds(self, channel: Channel) -> list[int]:
        """The descriptors of a channel that the process, or its ghost, has on the master."""
        return channel.fds

    def stands_still(self, summary: dict[str, Any]) -> None:
        self.children = children_of(summary["process"])

    async def make_ready(self, dst: Engine, look: Look) -> None:
        if on_terminal(self.proc.pid):  # it is to be born with the terminal
            await self._foresee(look)
            await self._prepare(dst)
        else:
            await together(lambda: self._prepare(dst), lambda: self._foresee(look))
        await self._gather(dst)

    def foresees(self) -> bool:
        process, attached = self.looked["process"], self._attached
        if attached is None or self.landing is None or self._externals != self.looked["externals"]:
            return False
        if self._born_as != self._birth() or sorted(self.children) != children_of(process):
            return False
        self.landing.fds, self.landing.externals = attached.fds, attached.places
        return True

    async def _gather(self, dst: Engine) -> None:
        """Has the node fetch what the process maps, while it still runs."""
        if self.mapped:
            await self._enter(Phase.GATHER)
            lacks = (await dst.call("gather", files=self.mapped))["lacks"]
            self.lacking = [self.mapped[index] for index in lacks]

    async def stage(self, dst: Engine) -> tuple[Landing, dict[str, Any]]:
        assert self.landing is not None
        return self.landing, {}

    async def land(self, dst: Engine, summary: dict[str, Any]) -> Landing:
        if self._attached is None or not self._has_foreseen(summary["externals"]):
            await self._attach_anew(dst, summary["externals"])
        children = children_of(summary["process"])
        if self._born_as != self._birth() or sorted(self.children) != children:
            self.children = children
            await self._prepare_anew(dst)
        assert self._attached is not None and self.landing is not None
        self.landing.fds, self.landing.externals = self._attached.fds, self._attached.places
        if self.company is not None:
            await self._take_ends(self.company, self.landing, self._attached)
        return self.landing

    async def land_anew(self, dst: Engine, summary: dict[str, Any]) -> Landing:
        await self._detach()
        self.children, self._born_as = children_of(summary["process"]), ()
        return await self.land(dst, summary)

    async def _take_ends(self, company: Company, landing: Landing, attached: Attached) -> None:
        """Its own ends, and those that it borrows; each descriptor of a node's can be given away once."""
        own = {int(external["key"]): attached.fds[attached.places[int(external["key"])]]
               for external in self._externals or [] if int(external["key"]) in attached.places}  # fmt: skip
        ends = own | await company.ends_for(self.proc.pid)
        landing.fds, landing.externals = list(ends.values()), {key: index for index, key in enumerate(ends)}

    async def found_there(self, error: BpfsError) -> dict[str, Any] | None:
        if error.code != errno.EHOSTDOWN or not await self.destination.outlives(self.proc.pid):
            return None
        return {"hostpid": 0, "ran_after": 0.0, "files": [], HANDLES: []}

    async def stay(self) -> None:
        await self._detach()

    async def _foresee(self, look: Look) -> None:
        externals = await look()
        if externals is not None:
            with suppress(BpfsError):  # it is tried again when the process stands still, and counts then
                await self._attach(externals)

    def _has_foreseen(self, externals: Externals) -> bool:
        """Whether the ends that were made are for the very objects it has; the numbers under which may have changed: a
        shell puts a descriptor away while it redirects."""
        assert self._attached is not None and self._externals is not None
        if externals == self._externals:
            return True
        now = {_object(external): external for external in externals}
        before = {_object(external): int(external["key"]) for external in self._externals}
        if now.keys() != before.keys() or not len(now) == len(externals) == len(self._externals):
            return False
        renamed = {key: now[what] for what, key in before.items()}
        self._attached.places = {int(renamed[key]["key"]): index for key, index in self._attached.places.items()}
        self.rename(renamed)
        return True

    @property
    def strict(self) -> bool:
        """Whether it is going to be a strict job."""
        return self.wants_strict or self._around.is_strict(self.destination.number)

    def _is_there(self) -> None:
        self.proc.put(self.destination.number)
        self.proc.wants_strict, self.proc.strict = self.wants_strict, self.strict

    def rename(self, renamed: Mapping[int, External]) -> None:
        """The externals that were foreseen, by their keys then, are these."""
        return

    async def _attach(self, externals: Externals) -> None:
        await self._enter(Phase.ATTACH)
        own = externals if self.company is None else await self.company.tell(self.proc.pid, externals)
        identity, channels = self.proc.identity, self.channels(own)
        self._session, self._front = self.terminal_of(channels)
        self._externals = externals
        if self.company is not None and (lent := self.company.lent(self.proc.pid)):
            channels = self.lending(channels, own, lent)
        self._attached = await attach(
            self.destination, self._around.streams, channels, identity.uid, identity.gid, self._session, self._front
        )
        if self.company is not None:
            self.company.attached(self.proc.pid, self._attached)

    async def _attach_anew(self, dst: Engine, externals: Externals) -> None:
        # It has opened or closed something, or changed its terminal, since it was looked at.
        before = self._attached is not None and self._attached.terminal
        await self._detach()
        await self._attach(externals)
        assert self._attached is not None
        if before or self._attached.terminal:
            await self._prepare_anew(dst)

    async def _detach(self) -> None:
        attached, self._attached = self._attached, None
        if attached is not None:
            attached.connection.close()
            await detach(self.destination, attached.number)

    async def _prepare_anew(self, dst: Engine) -> None:
        if self.company is not None:  # its children there would go with it
            raise BpfsError(errno.EAGAIN, f"process {self.proc.pid} has changed since it stands still")
        self.ahead = False  # what went ahead goes with the process that it went to
        await dst.call("discard")
        await self._prepare(dst)

    def _birth(self) -> tuple[object, ...]:
        """What decides how and under whom it is born on the node."""
        who = self.proc.identity
        return who.uid, who.ppid, who.pgid, who.sid

    async def _prepare(self, dst: Engine) -> None:
        """Has the node make the empty process, under placeholders for its parent, group and session."""
        proc, place = self.proc, self.destination
        self._born_as = self._birth()
        identity = proc.identity
        address = place.address(self.source)
        terminal = self._attached.terminal if self._attached is not None and self._session else ""
        async with self.company.birth(proc.pid, identity.ppid) if self.company is not None else nullcontext():
            reply = await dst.call(
                "prepare", pid=proc.pid, ppid=identity.ppid, pgid=identity.pgid, sid=identity.sid,
                place=place.target(proc.pid) | {"strict": self.strict}, address=address, front=self._front != 0,
                terminal=terminal, children=self.children, lazy=self.keep is not None,
            )  # fmt: skip
        self.landing = Landing(address, reply["port"], reply["token"])


def _object(external: External) -> tuple[Any, ...]:
    return tuple(external[name] for name in ("kind", "access", "flags", "dev", "ino", "termios", "winsize"))


def children_of(process: dict[str, Any]) -> list[Relative]:
    """Those that the engine's summary of a process tells."""
    return sorted(tuple(child) for child in process["children"])


def relatives(pids: Iterable[int]) -> list[Relative]:
    """What stand-ins for these processes of the master have to know; those that are gone are left out."""
    found: list[Relative] = []
    for pid in pids:
        with suppress(OSError):
            fields = procfs.read(procfs.own_file(pid, "stat")).decode(errors="replace").rpartition(")")[2].split()
            _, _, status = procfs.read(procfs.own_file(pid, "status")).decode(errors="replace").partition("\nUid:")
            found.append((pid, int(fields[2]), int(fields[3]), int(status.split(None, 1)[0])))
    return found
