"""A process moves together with its descendants: `PID tree`. All of them, or none.

What they share is gathered by the engine that holds the first (engine/kin.py), made once at the destination, and handed
to each. Else each moves as it would alone, with an engine of its own on both sides: members.py has them stand still,
company.py has the meetings.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from bpfs.errors import BpfsError
from bpfs.procs import faults
from bpfs.procs.company import Company, Handed
from bpfs.procs.exchange import all_of, refuse, together, transfer
from bpfs.procs.members import Member, Members
from bpfs.procs.migration import Migration, Seen
from bpfs.procs.phases import Figures, Phase
from bpfs.procs.places import HAND_OUT, HANDLES, Engine, Place
from bpfs.procs.process import MASTER, Process
from bpfs.procs.rights import admits, may_control
from bpfs.procs.routes import route
from bpfs.procs.stdio import External
from bpfs.procs.surroundings import Surroundings
from bpfs.procs.terminal import on_terminal
from bpfs.tree.base import WriteRequest
from engine.facts import unlike

if TYPE_CHECKING:
    from bpfs.procs.service import Procs

SWEPT = 1.0  # seconds for what failed on a node to be gone


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

        def admit(proc: Process) -> None:
            may_control(request.caller, proc)
            admits(self._procs.nodes.get(node), request.caller, proc)

        async with AsyncExitStack() as stack:
            members = Members(self._procs, source, destination, request, admit, stack)
            tree = _Tree(self._procs, self._around, members, source, destination, close)
            try:
                await members.foresee(root)
                await members.freeze(root)
                await faults.hold(Phase.FREEZE.value)
                await tree.share()
            except BaseException as error:
                known = error if isinstance(error, BpfsError) else BpfsError(errno.EINTR, "the move was called off")
                self._procs.refused(root.pid, node, known)  # before a script that moves itself reads it
                with trio.CancelScope(shield=True):
                    await members.thaw(known.code)
                raise
            await tree.go()

    async def obstacles(self, root: Process) -> list[str]:
        """Why a process cannot move with its tree now, in words; all of them are stopped for a moment to look."""
        source = self._procs.place(root.place)
        async with AsyncExitStack() as stack:
            members = Members(self._procs, source, None, None, lambda _: None, stack)
            try:
                await members.foresee(root)
                await members.freeze(root)
                found = await find_kin(members, self._around, not root.away, [])
                looking = {"family": True, "at_home": not root.away, "contents": self._around.contents}
                return found + await look_at(members, lambda member: looking | {"kin": member.kin})
            except BpfsError as error:
                return [error.sentence]
            finally:
                with trio.CancelScope(shield=True):
                    await members.thaw(0)


async def find_kin(members: Members, around: Surroundings, at_home: bool, differences: object) -> list[str]:
    """Has each know what it shares with the others. Returns what of that cannot move, in words. Raises BpfsError."""
    pids = [member.hostpid for member in members.all]
    shared = await members.kin.here.call(
        "find_kin", pids=pids, contents=around.contents, at_home=at_home, unlike=differences
    )
    for member in members.all:
        fds, maps, relayed = (shared[what][member.hostpid] for what in ("fds", "maps", "relayed"))
        member.kin = {"pids": pids, "fds": fds, "memory": maps, "relayed": relayed}
    return list(shared["refusals"])


async def look_at(members: Members, looking: Callable[[Member], dict[str, Any]]) -> list[str]:
    """Has all be looked at by their engines. Returns what is in the way, and in whose. Raises BpfsError."""

    async def look(member: Member) -> None:
        member.summary = await member.engine.call("inspect", **looking(member))

    await all_of(partial(look, member) for member in members.all)
    return [f"process {member.proc.pid}: {why}" for member in members.all for why in member.summary["refusals"]]


class _Tree:
    """One tree on its way."""

    def __init__(
        self, procs: Procs, around: Surroundings, members: Members, source: Place, destination: Place, close: bool
    ) -> None:
        self._procs, self._around, self._members = procs, around, members
        self._source, self._destination, self._close = source, destination, close
        self._companions: Company
        self._moves: list[tuple[Member, Migration]] = []

    # -- what they share -------------------------------------------------------------------------------------------

    async def share(self) -> None:
        """Has what they share made at the destination, and all looked at. Raises BpfsError."""
        members = self._members
        differences = unlike(self._source.facts, self._destination.facts)
        refusals = await find_kin(members, self._around, self._source.number == MASTER, differences)
        assert members.kin.there is not None
        self._companions = self._company(members.kin.there)
        self._moves = [(member, self._route(member, self._companions)) for member in members.all]
        for member, move in self._moves:
            await self._note_front(member, move)
        looking = {id(member): move.looking for member, move in self._moves}

        async def look() -> None:
            refuse(refusals + await look_at(members, lambda member: looking[id(member)]))

        await together(self._give, look)

    async def _note_front(self, member: Member, move: Migration) -> None:
        """What a shell on a node has put in front there is not in front here: its ghost is."""
        proc = member.proc
        if not proc.away or proc.identity.sid != proc.pid or not on_terminal(proc.pid):
            return
        stat = (await self._procs.ghosts.status_files(proc, ("stat",)))["stat"]
        front = int(stat.rpartition(b")")[2].split()[5])
        if front in {other.proc.identity.pgid for other in self._members.all}:
            move.front = front

    async def _give(self) -> None:
        here, there = self._members.kin.here, self._members.kin.there
        assert there is not None
        address = self._destination.address(self._source)
        reply = await there.call("listen", address=address)
        (root,) = self._destination.target(self._members.all[0].proc.pid).values()
        await transfer(
            lambda: here.call("give_kin", host=address, port=reply["port"], token=reply["token"]),
            lambda: there.call("take_kin", root=root),
            Figures(0.0),
        )

    def _company(self, engine: Engine) -> Company:
        kin = {int(member.proc.pid): member.kin for member in self._members.all}
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

        parents = {int(member.proc.pid): member.proc.identity.ppid for member in self._members.all[1:]}
        return Company(kin, parents if self._source.number != MASTER else {}, hand, hold, relayed, owner)

    # -- the move --------------------------------------------------------------------------------------------------

    async def go(self) -> None:
        """Moves them. Raises BpfsError."""
        company, moves = self._companions, self._moves
        errors: list[BpfsError] = []

        async def carry(member: Member, move: Migration) -> None:
            assert member.seat.there is not None
            seen = Seen(self._members.since, member.summary, member.seat.there)
            try:
                async with member.seat.stack:
                    release = self._release(member, company)
                    await self._procs.carry_out(move, lambda: move.run_stopped(member.engine, release, seen=seen))
            except BpfsError as error:
                if company.agreed and error.code == errno.ESRCH and member is not self._members.all[0]:
                    return  # it was killed at the last moment: all who live have moved
                errors.append(error)
                company.fail(BpfsError(error.code, f"process {member.proc.pid}: {error.sentence}"))
                for _, other in moves:
                    other.cancel()

        self._members.unmark()
        async with trio.open_nursery() as nursery:
            for member, move in moves:
                nursery.start_soon(carry, member, move)
        with suppress(BpfsError), trio.CancelScope(shield=True):
            assert self._members.kin.there is not None
            if company.agreed:
                await self._members.kin.there.call("keep_kin")
                await self._members.kin.here.call("end_kin")
            await self._members.kin.there.call("discard")  # who holds what they share would be in the next move's way
        if errors:
            await self._sweep()
            raise company.error or errors[0]

    async def _sweep(self) -> None:
        """Where engines have died, what they had begun stands for nobody on the node, and would be in the way."""
        if self._destination.number == MASTER:
            return
        pids = [member.proc.pid for member in self._members.all]
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
            try:
                await self._members.release(member, (company.error or error).code)
            except BpfsError:
                if member.proc.pledged:
                    await self._source.wake(member.proc)  # its engine has died: nobody else lets it run on
                raise

        return release
