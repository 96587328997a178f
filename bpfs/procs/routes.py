"""The three directions of a migration, and what each does with ghost and stdio.

* `Leave`: from the master to a node. The process turns into its ghost.
* `Hop`: from node to node. The ghost stays; only its stream changes.
* `Return`: home. The process is rebuilt inside its ghost, which so becomes the process again.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from bpfs import log
from bpfs.config import Config
from bpfs.errors import BpfsError, EngineRefused
from bpfs.nodes.blocks import Blocks
from bpfs.pidspace import BLOCK_BASE
from bpfs.procs.away import tell
from bpfs.procs.company import Company
from bpfs.procs.entries import Bound
from bpfs.procs.exchange import together
from bpfs.procs.ghost import ROOM_FOR_HEIR, Ghost
from bpfs.procs.ghosts import Ghosts
from bpfs.procs.migration import Externals, Look, Migration
from bpfs.procs.phases import Landing, Phase
from bpfs.procs.places import HANDLES, Engine, NodePlace, Place
from bpfs.procs.process import Process, ProcState
from bpfs.procs.programs import Programs
from bpfs.procs.stdio import Attached, External, Stdio, attach, detach, drop_files
from bpfs.procs.table import read_identity
from bpfs.procs.terminal import foreground_group, on_terminal, session_of
from bpfs.view.exports import Exports
from bpfs.wire import messages
from bpfs.wire.mux import ChanKind, Channel, ghost_table
from bpfs.wire.streams import StreamBook
from engine.facts import share_files
from engine.linux import procfs

UNTRACED_WITHIN = 10.0  # seconds in which a dying engine lets go of a process

_log = log.get("procs")

Relative = tuple[int, int, int, int]
"""A child's pid, process group, session and real uid."""


class Surroundings:
    """What all routes need of the master.

    Attributes:
        precopy: bytes of memory from which on it is sent ahead; None: never.
        compress: whether memory may be packed for slow links.
        fanout, tree_timeout: of images of programs for many nodes, see ImageTree.
        strict_nodes: numbers of nodes whose jobs are strict.
        contents: bytes of files without a name that may travel with a process.
        exports: what nodes with an empty root see.
        environment: of every ghost: BPFS_GHOST names the cluster, BPFS_LEASE how long one lives without a master.
    """

    def __init__(self, ghosts: Ghosts, streams: StreamBook, programs: Programs, blocks: Blocks, config: Config) -> None:
        self.precopy = config.precopy
        self.strict_nodes = config.strict
        self.contents = config.contentlimit
        self.compress = config.compress
        self.fanout, self.tree_timeout = config.fanout, config.tree_timeout
        self.exports = Exports(config.exports, (config.mount, str(config.key)))
        self.ghosts = ghosts
        self.blocks = blocks
        self.streams = streams
        self.programs = programs
        lease = max(1, round(config.lease))
        self.environment = [f"BPFS_GHOST={config.mount}".encode(), f"BPFS_LEASE={lease}".encode(), ROOM_FOR_HEIR]

    def is_strict(self, node: int) -> bool:
        """Whether all jobs of a node are strict (engine/strict.py)."""
        return any(node in numbers for numbers in self.strict_nodes)

    def is_ghost(self, pid: int) -> bool:
        """Whether a process of the master is a ghost of this cluster by now.

        Its environment tells: /proc/PID/exe of a process without new privileges goes on naming the ghost.
        """
        try:
            return Path(f"/proc/{pid}/environ").read_bytes().startswith(self.environment[0] + b"\0")
        except OSError:
            return False


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
        self.children = _children(summary["process"])

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
        if self._born_as != self._birth() or sorted(self.children) != _children(process):
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
        children = _children(summary["process"])
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
        self.children, self._born_as = _children(summary["process"]), ()
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
        self.proc.place = self.destination.number
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
        await self._around.ghosts.families.settle(self._away, summary["process"]["children"])
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
        self._has_tids_of_nodes = summary["process"]["highest_tid"] >= BLOCK_BASE
        self.goes_straight = not self._has_tids_of_nodes
        await self._around.ghosts.families.settle(away, summary["process"]["children"])
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
        self.proc.place = self.destination.number
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


def _children(process: dict[str, Any]) -> list[Relative]:
    return sorted(tuple(child) for child in process["children"])


def _object(external: External) -> tuple[Any, ...]:
    return tuple(external[name] for name in ("kind", "access", "flags", "dev", "ino", "termios", "winsize"))


async def vanish(migration: Migration, src: Engine, go: bool) -> None:
    """Ends the frozen copy on a node, or has it stand for itself where relatives need that.

    Where the node is lost just then, waits until the copy cannot be alive.

    Raises:
        BpfsError: the worker died before it did anything: the kernel let the copy run on.
    """
    proc, place = migration.proc, migration.source
    assert isinstance(place, NodePlace)
    proc.leaving = True
    try:
        if not proc.source_lost:
            await _kill_copy(migration, place, src, go)
    except BpfsError as error:
        if error.code != errno.EHOSTDOWN:
            raise
        if not await _has_gone_since(proc, place, error):
            if migration.company is None:
                proc.doom = proc.doom or proc.unclaimed
                raise
            await _end_copy(migration, NodePlace(place.node))
    finally:
        proc.leaving = False


async def _kill_copy(migration: Migration, place: NodePlace, src: Engine, go: bool) -> None:
    proc, company = migration.proc, migration.company
    leaving: dict[str, Any] = {"init": place.node.init, "leaving": migration.along}
    try:
        await src.call("vanish", go=go, **leaving)
    except BpfsError as error:
        # EIO: the worker has died, maybe between the kill and its word. What has become of the copy decides.
        if error.code == errno.EHOSTDOWN or (company is None and error.code != errno.EIO):
            raise
        if company is not None and isinstance(error, EngineRefused):
            await src.call("vanish", **leaving)  # its copy has died, but all have agreed
        elif await _runs(proc, place):
            if company is None:
                raise
            await _end_copy(migration, place)
        _log.warning("process %d: its copy on node %d is gone, and so is the worker", proc.pid, place.number)


async def _end_copy(migration: Migration, place: NodePlace) -> None:
    """All have agreed: it stands still, and ends by another's hand."""
    async with place.engine() as engine:
        await engine.call("freeze", pid=await place.hostpid(migration.proc))
        await engine.call("inspect", **migration.looking)
        await engine.call("vanish", init=place.node.init, leaving=migration.along)


async def _has_gone_since(proc: Process, place: NodePlace, error: BpfsError) -> bool:
    """Whether the link was lost after the copy was killed, or no copy can be alive by now. One that ended by itself has
    run on before."""
    _log.warning("process %d: waiting until node %d is back, or fenced: %s", proc.pid, place.number, error)
    if await place.outlives(proc.pid):
        proc.hostpid = 0
        return False
    return proc.unclaimed is None or proc.unclaimed.signal == signal.SIGKILL


def vanishing(migration: Migration) -> dict[str, Any]:
    """What `send` is told of that. The copy's end is nobody's business from now on."""
    assert isinstance(migration.source, NodePlace)
    migration.proc.leaving = True
    return {"depart": "vanish", "init": migration.source.node.init}


async def has_vanished(migration: Migration, error: BpfsError | None, whole: bool) -> bool:
    """Whether the copy on a node is gone, or cannot be alive any more, though its worker said this, or nothing."""
    proc, place = migration.proc, migration.source
    assert isinstance(place, NodePlace)
    if isinstance(error, EngineRefused):
        return False
    try:
        if error is not None and error.code == errno.EHOSTDOWN:
            raise error
        # The worker has died, maybe between the kill and its word. What has become of the copy decides.
        gone = not await _runs(proc, place)
    except BpfsError as lost:
        if lost.code != errno.EHOSTDOWN:
            raise
        return whole and await _has_gone_since(proc, place, lost)
    if gone:
        _log.warning("process %d: its copy on node %d is gone, and so is the worker", proc.pid, place.number)
    return gone


async def _runs(proc: Process, place: NodePlace) -> bool:
    """Whether the copy on a node goes on after its tracer's death: what is being killed can be stopped no more.

    Raises:
        BpfsError: EHOSTDOWN.
    """
    proc.hostpid = 0  # the node is asked for it: another process may have got the number
    with suppress(BpfsError):  # ended; or the node is gone, which is met again below
        reply = await place.link.request(messages.JobStatus(proc.pid, ("status",)), place.link.patience)
        if isinstance(reply, messages.JobStatusIs) and reply.texts[0].startswith(b"Name:\tnodeinit\n"):
            return False  # it stands for itself there
    async with place.engine() as engine:
        try:
            await engine.call("freeze", pid=await place.hostpid(proc))
        except BpfsError as error:
            if error.code == errno.EHOSTDOWN:
                raise
            return error.code != errno.ESRCH
        await engine.call("release")
    return True


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


def relatives(pids: Iterable[int]) -> list[Relative]:
    """What stand-ins for these processes of the master have to know; those that are gone are left out."""
    found: list[Relative] = []
    for pid in pids:
        with suppress(OSError):
            fields = Path(procfs.own_file(pid, "stat")).read_text(errors="replace").rpartition(")")[2].split()
            _, _, status = Path(procfs.own_file(pid, "status")).read_text(errors="replace").partition("\nUid:")
            found.append((pid, int(fields[2]), int(fields[3]), int(status.split(None, 1)[0])))
    return found


def route(proc: Process, source: Place, destination: Place, around: Surroundings) -> Migration:
    """The migration from here to there."""
    migration: Migration
    if not isinstance(source, NodePlace):
        assert isinstance(destination, NodePlace)
        migration = Leave(proc, source, destination, around)
    elif isinstance(destination, NodePlace):
        migration = Hop(proc, source, destination, around)
    else:
        migration = Return(proc, source, destination, around)
    migration.looking["contents"], migration.compress = around.contents, around.compress
    return migration
