"""A process moves together with its descendants: `PID tree`. All of them, or none.

They are stopped from the top down, so that none of them can fork any more when its children are asked for. What they
share is gathered by the engine that holds the first (engine/kin.py), made once at the destination, and handed to each.
Else each moves as it would alone, with an engine of its own on both sides: company.py has the meetings.
"""

from __future__ import annotations

import errno
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import trio

from bpfs.errors import BpfsError
from bpfs.procs.away import BORN_WITHIN
from bpfs.procs.company import Company, Handed
from bpfs.procs.exchange import refuse, transfer
from bpfs.procs.migration import Migration
from bpfs.procs.phases import Figures
from bpfs.procs.places import HAND_OUT, HANDLES, Engine, Place
from bpfs.procs.process import MASTER, Process, ProcState
from bpfs.procs.rights import admits, bound, may_control, writes_itself
from bpfs.procs.routes import Surroundings, route
from bpfs.procs.stdio import External
from bpfs.tree.base import Caller, WriteRequest
from engine.facts import unlike

if TYPE_CHECKING:
    from bpfs.procs.service import Procs

LARGEST = 250  # processes; each takes two engine workers, of some 10 MB, while it moves
SWEPT = 1.0  # seconds for what failed on a node to be gone
GONE = (errno.ESRCH, errno.EPERM)  # of a freeze: it has ended, or is a zombie


@dataclass(slots=True)
class Member:
    """One process of a tree, which stands still.

    Attributes:
        writer: the write that asked for the move, where it waits in that.
        kin: its part of what all share.
    """

    proc: Process
    engine: Engine
    hostpid: int
    writer: WriteRequest | None
    kin: dict[str, Any] = field(default_factory=dict)


class Trees:
    """Moves of trees."""

    def __init__(self, procs: Procs, around: Surroundings) -> None:
        self._procs = procs
        self._around = around

    async def move(self, pid: int, node: int, request: WriteRequest, close: bool) -> None:
        """Moves a process and all its descendants; returns when they run there.

        Raises:
            BpfsError: as of `Procs.move`; none of them has moved.
        """
        root = await self._procs.admit(pid, node, request.caller)
        if root.place == node:
            return
        if self._around.is_strict(node):
            raise BpfsError(errno.EOPNOTSUPP, f"jobs of node {node} are strict, and those move one by one")
        source, destination = self._procs.place(root.place), self._procs.place(node)
        async with AsyncExitStack() as stack:
            tree = _Tree(self._procs, self._around, source, destination, request, close, stack)
            try:
                await tree.freeze(root)
                await tree.share()
            except BaseException as error:
                known = error if isinstance(error, BpfsError) else BpfsError(errno.EINTR, "the move was called off")
                self._procs.refused(root.pid, node, known)  # before a script that moves itself reads it
                with trio.CancelScope(shield=True):
                    await tree.thaw(known.code)
                raise
            await tree.go()


class _Tree:
    """One tree on its way."""

    def __init__(
        self, procs: Procs, around: Surroundings, source: Place, destination: Place, request: WriteRequest, close: bool,
        stack: AsyncExitStack,
    ) -> None:  # fmt: skip
        self._procs, self._around, self._stack = procs, around, stack
        self._source, self._destination = source, destination
        self._request, self._close = request, close
        self._members: list[Member] = []
        self._marked: list[Process] = []
        self._companions: Company
        self._moves: list[tuple[Member, Migration]] = []
        self._since = 0.0  # when they were stopped

    # -- all stand still -----------------------------------------------------------------------------------------

    async def freeze(self, root: Process) -> None:
        """Stops the tree, from its top down; who is born meanwhile is met as its parent's child. Raises BpfsError."""
        self._since = time.perf_counter()
        todo = [root]
        while todo:
            proc = todo.pop(0)
            if len(self._members) == LARGEST:
                raise BpfsError(errno.E2BIG, f"process {root.pid} has more than {LARGEST - 1} descendants")
            try:
                member = await self._stop(proc)
            except BpfsError as error:
                if proc is root or error.code not in GONE or not await self._has_ended(proc):
                    raise BpfsError(error.code, f"process {proc.pid} of the tree: {error.sentence}") from None
                self._unmark(proc)
                continue
            todo += await self._children(member)

    async def _stop(self, proc: Process) -> Member:
        caller = self._request.caller
        await self._check(proc, caller)
        self._mark(proc)
        hostpid = await self._source.hostpid(proc)
        writer = self._request if writes_itself(caller, proc) else None
        member = Member(proc, await self._stack.enter_async_context(self._source.engine()), hostpid, writer)
        await member.engine.call("freeze", pid=hostpid, writing=writer is not None)
        self._members.append(member)
        if writer is not None:
            await writer.answer()
        return member

    async def _check(self, proc: Process, caller: Caller) -> None:
        may_control(caller, proc)
        if proc.place != self._source.number:
            where = "the master" if proc.place == MASTER else f"node {proc.place}"
            raise BpfsError(errno.EOPNOTSUPP, f"it is on {where}")
        if proc.strict or proc.wants_strict:
            raise BpfsError(errno.EOPNOTSUPP, "it is a strict job, and those move one by one")
        if proc.state is ProcState.MIGRATING:
            raise BpfsError(errno.EBUSY, f"it is moving already: {proc.progress}")
        if proc.busy:
            raise BpfsError(errno.EBUSY, f"it is busy: {proc.busy}")
        admits(self._procs.nodes.get(self._destination.number), caller, proc)
        if why := bound(proc):
            raise BpfsError(errno.EOPNOTSUPP, why)

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

    async def _children(self, member: Member) -> list[Process]:
        """Its children that run: those that have ended stay, and what stands for them there ends in the same way."""
        found = []
        for pid, pgid, sid, uid in (await member.engine.call("family"))["children"]:
            if not member.proc.away:
                with suppress(BpfsError):  # it has ended
                    found.append(self._procs.table.find(pid))
                continue
            child = await self._known(pid)
            if child is not None:  # what a node tells of its jobs may come late
                who = child.identity
                child.identity = replace(who, ppid=int(member.proc.pid), pgid=pgid, sid=sid, uid=uid)
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

    async def thaw(self, code: int) -> None:
        """Lets all of them run on; a write that asked for this fails with `code`."""
        for member in self._members:
            with suppress(BpfsError):  # its engine has died, or it has
                await member.engine.call("release", errno=code if member.writer is not None else 0)
        for proc in list(self._marked):
            self._unmark(proc)

    # -- what they share -------------------------------------------------------------------------------------------

    async def share(self) -> None:
        """Has what they share made at the destination, and all made ready for their moves. Raises BpfsError."""
        first, pids = self._members[0], [member.hostpid for member in self._members]
        shared = await first.engine.call(
            "find_kin", pids=pids, contents=self._around.contents, at_home=not first.proc.away,
            unlike=unlike(self._source.facts, self._destination.facts),
        )  # fmt: skip
        refuse(shared["refusals"])
        for member in self._members:
            fds, maps, relayed = (shared[what][member.hostpid] for what in ("fds", "maps", "relayed"))
            member.kin = {"pids": pids, "fds": fds, "memory": maps, "relayed": relayed}
        engine = await self._stack.enter_async_context(self._destination.engine())
        address = self._destination.address(self._source)
        reply = await engine.call("listen", address=address)
        (root,) = self._destination.target(first.proc.pid).values()
        await transfer(
            lambda: first.engine.call("give_kin", host=address, port=reply["port"], token=reply["token"]),
            lambda: engine.call("take_kin", root=root),
            Figures(0.0),
        )
        self._companions = self._company(engine)
        self._moves = [(member, self._route(member, self._companions)) for member in self._members]

    def _company(self, engine: Engine) -> Company:
        kin = {int(member.proc.pid): member.kin for member in self._members}
        relayed = {pid: dict(mine["relayed"]) for pid, mine in kin.items()}

        @asynccontextmanager
        async def hand(pid: int, borrowed: Mapping[int, int]) -> AsyncIterator[Handed]:
            memory = [tuple(what) for what in kin[pid]["memory"]]
            own = {key: key for _, key in kin[pid]["fds"]} | {key: key for *_, key in memory} | dict(borrowed)
            handed = Handed([], list(own), memory)
            if own:
                handed.fds = (await engine.call(HAND_OUT, keys=list(own.values())))[HANDLES]
            try:
                yield handed
            finally:
                await self._destination.drop(handed.fds)

        async def hold(of: Sequence[tuple[int, int, int]]) -> None:
            await engine.call("borrow", of=of)

        def owner(pid: int, external: External) -> int:
            """At home the first who has it, but of terminals; on a node whose stream it is."""
            if self._source.number != MASTER:
                what = external["dev"], external["ino"]
                ends = ((one, self._procs.ghosts.stand_in(one)) for one in (pid, *kin))
                return next((one for one, away in ends if away is not None and what in away.stdio.ends), 0)
            if external["kind"] == "tty":
                return pid
            this = relayed[pid][external["fds"][0]]
            return next(one for one in kin if this in relayed[one].values())

        return Company(kin, hand, hold, relayed, owner)

    # -- the move --------------------------------------------------------------------------------------------------

    async def go(self) -> None:
        """Moves them. Raises BpfsError."""
        company, moves = self._companions, self._moves
        errors: list[BpfsError] = []

        async def carry(member: Member, move: Migration) -> None:
            try:
                await self._procs.carry_out(
                    move, lambda: move.run_stopped(member.engine, self._release(member, company), since=self._since)
                )
            except BpfsError as error:
                errors.append(error)
                company.fail(BpfsError(error.code, f"process {member.proc.pid}: {error.sentence}"))
                for _, other in moves:
                    other.cancel()

        for proc in list(self._marked):
            self._unmark(proc)
        async with trio.open_nursery() as nursery:
            for member, move in moves:
                nursery.start_soon(carry, member, move)
        if errors:
            await self._sweep()
            raise company.error or errors[0]

    async def _sweep(self) -> None:
        """Where engines have died, what they had begun stands for nobody on the node, and would be in the way."""
        if self._destination.number == MASTER:
            return
        pids = [member.proc.pid for member in self._members]
        where: dict[str, Any] = {**self._destination.target(pids[0])}
        with suppress(BpfsError), trio.move_on_after(SWEPT):
            async with self._destination.engine() as engine:
                while (await engine.call("sweep", pids=pids, **where))["left"]:
                    await trio.sleep(SWEPT / 50)

    def _route(self, member: Member, company: Company) -> Migration:
        move = route(member.proc, self._source, self._destination, self._around)
        move.company = company
        move.looking["kin"] = member.kin
        if self._close:
            move.looking["close"] = True
        return move

    def _release(self, member: Member, company: Company) -> Callable[[BpfsError], Awaitable[object]]:
        async def release(error: BpfsError) -> None:
            code = (company.error or error).code
            try:
                await member.engine.call("release", errno=code if member.writer is not None else 0)
            except BpfsError:
                if member.proc.pledged:
                    await self._source.wake(member.proc)  # its engine has died: nobody else lets it run on
                raise

        return release
