"""Those who move together: all of them, or none.

Each moves as if it were alone (migration.py), but for three meetings: a process is made on the node after its parent;
none of the sources goes before all copies are whole, and all have agreed; no copy runs before all sources are gone. Who
fails before they have agreed keeps all of them where they were. From then on there is no way back, for anyone: a source
whose engine dies stands still until it has been ended by another. On a node no source goes before its children: the
kernel has an orphaned group whose members are stopped go on.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from bpfs.errors import BpfsError
from bpfs.procs.stdio import Attached, External

FIRST_ALIAS = 1 << 21  # keys of what others than the owner have of a channel; above engine.descriptors.kin.FIRST_KEY

Owner = Callable[[int, External], int]
"""Whose channel an external of a process is: a pid; 0: nobody's of them."""

Hand = Callable[[int, Mapping[int, int]], AbstractAsyncContextManager["Handed"]]
"""What a process is handed, by its pid and what it borrows (`Migration.borrowed`)."""

Hold = Callable[[Sequence[tuple[int, int, int]]], Awaitable[None]]
"""Keeps what ghosts have for others: key, pid and number there."""


@dataclass(slots=True)
class Handed:
    """What one process is handed of what all share, at the destination.

    Attributes:
        fds: for a call of an engine there, in the order of `keys`.
        memory: device and inode at the source, and key, of memory among it.
    """

    fds: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    memory: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Borrowed:
    """One external that is another's channel.

    Attributes:
        external: as the engine described it.
        key: by which the owner's ends have it.
        owner: pid.
    """

    external: External
    key: int
    owner: int


class Company:
    """One tree on its way.

    Attributes:
        error: why none of them moves.
        agreed: whether there is no way back.
    """

    def __init__(
        self, pids: Iterable[int], above: Mapping[int, int], hand: Hand, hold: Hold,
        relayed: Mapping[int, Mapping[int, int]], owner: Owner,
    ) -> None:  # fmt: skip
        """Args:
        pids: each after its parent.
        above: child -> parent, of sources that go in that order.
        hand: what it gives is taken back when the context ends.
        relayed: of each, its descriptor numbers and a number of the open file description.
        owner: of externals.
        """
        self.pids = list(pids)
        self._above = above
        self._owner, self._relayed, self._hold = owner, relayed, hold
        self._externals: dict[int, Sequence[dict[str, Any]]] = {}
        self._told = trio.Event()
        self._attached: dict[int, Attached] = {}
        self._attaching = {pid: trio.Event() for pid in self.pids}
        self._borrowed: list[tuple[int, Borrowed]] = []
        self.error: BpfsError | None = None
        self.agreed = False
        self.shared_with = hand
        self._born = {pid: trio.Event() for pid in self.pids}
        self._landing, self._landed = len(self.pids), trio.Event()
        self._undecided, self._decided = len(self.pids), trio.Event()
        self._gone = {pid: trio.Event() for pid in self.pids}

    def fail(self, error: BpfsError) -> None:
        """One of them cannot move: none does, unless all have agreed already."""
        if not self.agreed and self.error is None:
            self.error = error
            for event in [self._decided, self._landed, self._told, *self._born.values(), *self._attaching.values()]:
                event.set()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    @asynccontextmanager
    async def birth(self, pid: int, ppid: int) -> AsyncIterator[None]:
        """A process is made at the destination in this context, after its parent. Raises BpfsError."""
        if ppid in self._born:
            await self._born[ppid].wait()
        self._check()
        yield
        self._born[pid].set()

    # -- what is relayed: whoever has something of it goes on sharing it ------------------------------------------

    async def tell(self, pid: int, externals: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A process has these. Returns, when all have told, those that are channels of its own.

        Raises:
            BpfsError: EOPNOTSUPP, one of them is nobody's; another cannot move.
        """
        self._externals[pid] = externals
        if len(self._externals) == len(self.pids) and not self._told.is_set():
            self._divide()
            self._told.set()
        await self._told.wait()
        self._check()
        for one in self.borrowed(pid):
            if not one.owner:
                what = f"fd {one.external['fds'][0]} is a {one.external['kind']} to another process on the node"
                raise BpfsError(errno.EOPNOTSUPP, what)
        return [one for one in externals if self._owner(pid, one) == pid]

    def _divide(self) -> None:
        for pid in self.pids:
            for external in self._externals[pid]:
                owner = self._owner(pid, external)
                if owner != pid:
                    self._borrowed.append((pid, Borrowed(external, FIRST_ALIAS + len(self._borrowed), owner)))

    def borrowed(self, pid: int) -> list[Borrowed]:
        """What of its externals is another's."""
        return [one for borrower, one in self._borrowed if borrower == pid]

    def description(self, pid: int, external: External) -> int:
        """A number for the open file description."""
        return self._relayed[pid][external["fds"][0]]

    def description_of(self, key: int) -> int:
        """Likewise, of what is lent by this key."""
        return next(self.description(pid, one.external) for pid, one in self._borrowed if one.key == key)

    async def take_home(self, pid: int, numbers: Mapping[int, tuple[int, int]]) -> None:
        """Has what a process borrows kept, as long as ghosts have it. Returns when all have done so.

        Args:
            numbers: key of what is lent -> pid of a ghost, and the number there.

        Raises:
            BpfsError: a ghost has ended; another cannot move.
        """
        if numbers:
            await self._hold([(key, *where) for key, where in numbers.items()])
        self._landing -= 1
        if not self._landing:
            self._landed.set()
        await self._landed.wait()
        self._check()

    def lent(self, pid: int) -> list[External]:
        """Externals of others that are its channels: by keys of their own, and no descriptors of its."""
        return [{**one.external, "key": one.key, "fds": []} for _, one in self._borrowed if one.owner == pid]

    def attached(self, pid: int, attached: Attached) -> None:
        """A process, and those to whom it lends, have their new ends on a node."""
        self._attached[pid] = attached
        self._attaching[pid].set()

    async def ends_for(self, pid: int) -> dict[int, int]:
        """What a process borrows on a node: the key of its external -> a descriptor there. Raises BpfsError."""
        found = {}
        for one in self.borrowed(pid):
            await self._attaching[one.owner].wait()
            self._check()
            owner = self._attached[one.owner]
            found[int(one.external["key"])] = owner.fds[owner.places[one.key]]
        return found

    # -- the decision ------------------------------------------------------------------------------------------

    async def agree(self) -> None:
        """This one can go. Returns when all can.

        Raises:
            BpfsError: one cannot.
        """
        self._undecided -= 1
        if not self._undecided and self.error is None:
            self.agreed = True
            self._decided.set()
        await self._decided.wait()
        if not self.agreed:
            self._check()

    @asynccontextmanager
    async def going(self, pid: int) -> AsyncIterator[None]:
        """A source ends in this context, after those of its children for which the order counts."""
        try:
            for child, parent in self._above.items():
                if parent == pid:
                    await self._gone[child].wait()
            yield
        finally:
            self._gone[pid].set()

    async def wait_gone(self) -> None:
        """Waits until all sources have ended."""
        for gone in self._gone.values():
            await gone.wait()
