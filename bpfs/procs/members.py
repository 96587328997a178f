"""The members of a tree: who they are, and how all of them come to stand still.

Their engines are made ready while they run: that takes longer than all the rest. Then they are stopped level by level,
from the top down, so that none of them can fork any more when its children are asked for.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from bpfs.errors import BpfsError
from bpfs.procs.away import BORN_WITHIN
from bpfs.procs.exchange import all_of
from bpfs.procs.places import Engine, Place
from bpfs.procs.process import MASTER, Process, ProcState
from bpfs.procs.rights import bound, writes_itself
from bpfs.tree.base import WriteRequest
from engine.linux import procfs

if TYPE_CHECKING:
    from bpfs.procs.service import Procs

LARGEST = 250  # processes; each takes two engine workers, of some 10 MB, while it moves
WARM = 64  # engines that are made ready beforehand with all of their memory
NOBODY = 0  # a pid


@dataclass(slots=True)
class Seat:
    """The engines for one process.

    Attributes:
        there: of the destination; None where there is none.
        stack: ends both.
    """

    here: Engine
    there: Engine | None
    stack: AsyncExitStack


@dataclass(slots=True)
class Member:
    """One process of a tree, which stands still.

    Attributes:
        writer: the write that asked for the move, where it waits in that.
        kin: its part of what all share.
        summary: what its engine says of it.
    """

    proc: Process
    seat: Seat
    hostpid: int
    writer: WriteRequest | None
    kin: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        """That holds it."""
        return self.seat.here


class Members:
    """All of a tree."""

    def __init__(
        self, procs: Procs, source: Place, destination: Place | None, request: WriteRequest | None,
        admit: Callable[[Process], None], stack: AsyncExitStack,
    ) -> None:  # fmt: skip
        """Args:
        destination: where they are to go; None: nowhere, they are only looked at.
        request: the write that asks for it, which one of them may wait in.
        admit: raises BpfsError where one may not.
        stack: ends all engines.
        """
        self._procs, self._source, self._destination = procs, source, destination
        self._request, self._admit, self._stack = request, admit, stack
        self._seats: dict[int, Seat] = {}
        self._marked: list[Process] = []
        self.all: list[Member] = []
        self.kin: Seat
        """For what they share; there is one after `foresee`."""
        self.since = 0.0
        """When the first of them was stopped, by time.perf_counter()."""

    # -- before ------------------------------------------------------------------------------------------------

    async def foresee(self, root: Process) -> None:
        """Has engines ready for all that there are now. Raises BpfsError."""
        pids = [NOBODY, *self._descendants(root)]
        await all_of(partial(self._open, pid, index < WARM) for index, pid in enumerate(pids))
        self.kin = self._seats[NOBODY]

    def _descendants(self, root: Process) -> list[int]:
        found = [int(root.pid)]
        for pid in found:  # which grows
            found += self._known_children(pid)
            if len(found) > LARGEST:
                break
        return found[:LARGEST]

    def _known_children(self, pid: int) -> list[int]:
        if self._source.number == MASTER:
            return procfs.children(pid)
        away = self._procs.ghosts.stand_in(pid)
        children = away.children if away is not None else ()
        table, place = self._procs.table, self._source.number
        return [one for one in children if (proc := table.known(one)) is not None and proc.place == place]

    async def _open(self, pid: int, warm: bool) -> None:
        stack = AsyncExitStack()
        self._stack.push_async_exit(stack)
        here = await stack.enter_async_context(self._source.engine())
        there = None
        if self._destination is not None:
            there = await stack.enter_async_context(self._destination.engine())
        self._seats[pid] = Seat(here, there, stack)
        if warm:
            engines = (here,) if there is None else (here, there)
            await all_of(partial(engine.call, "hello", warm=True) for engine in engines)

    # -- all stand still -----------------------------------------------------------------------------------------

    async def freeze(self, root: Process) -> None:
        """Stops the tree, from its top down; who is born meanwhile is met as its parent's child. Raises BpfsError."""
        self.since = time.perf_counter()
        level = [root]
        while level:
            if len(self.all) + len(level) > LARGEST:
                raise BpfsError(errno.E2BIG, f"process {root.pid} has more than {LARGEST - 1} descendants")
            first = len(self.all)
            found = await all_of(partial(self._stop, proc, proc is root) for proc in level)
            self.all[first:] = sorted(self.all[first:], key=lambda member: member.proc.pid)
            level = [child for children in found for child in children]

    async def _stop(self, proc: Process, is_root: bool) -> list[Process]:
        """Gives its children that run: those that have ended stay, and what stands for them there ends likewise."""
        try:
            self._check(proc)
            self._mark(proc)
            member = Member(proc, await self._seat(proc.pid), await self._source.hostpid(proc), self._writer(proc))
            return await self._children(member, await self._seize(member))
        except BpfsError as error:
            if is_root or error.code != errno.ESRCH or not await self._has_ended(proc):
                raise BpfsError(error.code, f"process {proc.pid} of the tree: {error.sentence}") from None
            self._unmark(proc)
            return []

    async def _seat(self, pid: int) -> Seat:
        if pid not in self._seats:  # it was born a moment ago
            await self._open(pid, warm=False)
        return self._seats[pid]

    def _writer(self, proc: Process) -> WriteRequest | None:
        request = self._request
        return request if request is not None and writes_itself(request.caller, proc) else None

    async def _seize(self, member: Member) -> list[tuple[int, int, int, int]]:
        """Returns the children: pid, group, session, user."""
        waits = member.writer is not None
        reply = await member.engine.call("freeze", pid=member.hostpid, writing=waits, children=not waits)
        self.all.append(member)
        if member.writer is not None:
            await member.writer.answer()
            reply = await member.engine.call("family")
        return list(reply["children"])

    def _check(self, proc: Process) -> None:
        if proc.place != self._source.number:
            where = "the master" if proc.place == MASTER else f"node {proc.place}"
            raise BpfsError(errno.EOPNOTSUPP, f"it is on {where}")
        if proc.strict or proc.wants_strict:
            raise BpfsError(errno.EOPNOTSUPP, "it is a strict job, and those move one by one")
        if proc.state is ProcState.MIGRATING:
            raise BpfsError(errno.EBUSY, f"it is moving already: {proc.progress}")
        if proc.busy:
            raise BpfsError(errno.EBUSY, f"it is busy: {proc.busy}")
        if why := bound(proc):
            raise BpfsError(errno.EOPNOTSUPP, why)
        self._admit(proc)

    def _mark(self, proc: Process) -> None:
        proc.busy = "it moves with its tree"
        self._procs.table.add(proc)
        self._marked.append(proc)

    def _unmark(self, proc: Process) -> None:
        if proc in self._marked:
            self._marked.remove(proc)
            proc.busy = ""
            if not proc.away and len(proc.history) == 1:
                self._procs.table.forget(proc)

    async def _has_ended(self, proc: Process) -> bool:
        try:
            status = (await self._procs.ghosts.status_files(proc, ("status",)))["status"]
        except BpfsError:
            return True
        return not status or b"\nState:\tZ" in status or b"\nState:\tX" in status

    async def _children(self, member: Member, children: Sequence[tuple[int, int, int, int]]) -> list[Process]:
        found = []
        for pid, pgid, sid, uid in children:
            if not member.proc.away:
                with suppress(BpfsError):  # it has ended
                    found.append(self._procs.table.find(pid))
                continue
            child = await self._known(pid)
            if child is not None:  # what a node tells of its jobs may come late
                child.identity = replace(child.identity, ppid=int(member.proc.pid))
                if (away := self._procs.ghosts.stand_in(pid)) is not None:
                    await self._procs.ghosts.belongs(away, pgid, sid, uid)
                found.append(child)
        return found

    async def _known(self, pid: int) -> Process | None:
        """The process that a child is; None where it has just ended. What a node tells of its jobs may come late."""
        table, ghosts = self._procs.table, self._procs.ghosts
        with trio.move_on_after(BORN_WITHIN):
            while True:
                proc, away = table.known(pid), ghosts.stand_in(pid)
                if proc is not None and away is not None and proc.place == self._source.number:
                    return proc
                await trio.sleep(BORN_WITHIN / 100)
        proc = table.known(pid)
        if proc is not None and proc.place == self._source.number:
            raise BpfsError(errno.EOPNOTSUPP, f"its child {pid} has no ghost on the master")
        return proc

    # -- afterwards --------------------------------------------------------------------------------------------

    def unmark(self) -> None:
        """From now on each is busy with its own move, or with nothing."""
        for proc in list(self._marked):
            self._unmark(proc)

    async def release(self, member: Member, code: int) -> None:
        """Lets one run on where it was; a write that it waits in fails with `code`. Raises BpfsError."""
        await member.engine.call("release", errno=code if member.writer is not None else 0)

    async def thaw(self, code: int) -> None:
        """Lets all of them run on, from the bottom up."""

        async def let_go(member: Member) -> None:
            with suppress(BpfsError):  # its engine has died, or it has
                await self.release(member, code)

        await all_of(partial(let_go, member) for member in reversed(self.all))
        self.unmark()
