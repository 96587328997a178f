"""Which number a slave gets, and whether it gets in at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from bpfs.config import Config
from bpfs.errors import BpfsError
from bpfs.nodes.registry import Node, NodeTable
from bpfs.wire.messages import Join

BARRED = "down by the administrator"


class NotAdmitted(Exception):
    """A slave is refused; `parked`: it should wait for the reason to go."""

    def __init__(self, reason: str, number: int = -1, parked: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.number = number
        self.parked = parked


@dataclass(slots=True)
class _Known:
    # Who had a number last: a slave without a configured number gets the one back that it had.
    identity: tuple[str, tuple[str, ...]] = ("", ())
    machine: bytes = b""
    real: bool = False

    def is_same(self, join: Join) -> bool:
        """Whether no process of who had the number last can be alive when this slave comes: it is the same one, or a
        real machine that was started anew (it has the same cards, and its kernel kills all jobs with the slave)."""
        if self.machine == join.machine:
            return True
        return self.real and join.real and bool(join.macs) and self.identity[1] == join.macs


@dataclass(slots=True)
class Admission:
    """The gate of the cluster."""

    table: NodeTable
    config: Callable[[], Config]  # the configuration as it is now
    takes_up: Callable[[Join], bool] = lambda _: False
    """Whether this master knows the jobs that a slave says it has kept, as an earlier one's."""
    is_own: Callable[[Join], bool] = lambda _: False
    """The same, as its own."""
    _known: dict[int, _Known] = field(default_factory=dict)
    _unbarred: dict[int, trio.Event] = field(default_factory=dict)

    def admit(self, join: Join) -> Node:
        """Find the node for a slave that has proved the key.

        Raises:
            NotAdmitted: with the reason for the slave.
        """
        if join.arch != os.uname().machine:
            raise NotAdmitted(f"its machine is {join.arch[:40]!r}, the master's is {os.uname().machine}")
        try:
            number = self._number(join)
            node = self.table.find(number) or self.table.add(number)
        except BpfsError as error:
            raise NotAdmitted(error.sentence) from None
        known = self._known.setdefault(number, _Known())
        same = known.is_same(join)
        if node.barred:
            raise NotAdmitted(BARRED, number, parked=True)
        if join.resumes:
            same = self._may_resume(join, node, known)
            if not same:
                raise NotAdmitted("this master did not expect the processes that it has", number)
        if node.session is not None and not same:
            raise NotAdmitted(f"node {number} is connected already, from {node.address}", number)
        # A slave kills its jobs before it connects again: when the very same one comes, they are gone.
        if node.doubtful and not same:
            raise NotAdmitted(f"processes of node {number}'s former slave may still run; try again later", number)
        known.machine = join.machine
        known.identity = (join.hostname, join.macs)
        known.real = join.real
        return node

    def _may_resume(self, join: Join, node: Node, known: _Known) -> bool:
        if join.returns and known.machine == join.machine and self.is_own(join):
            return node.doubtful and node.heard_reports >= 0
        # A node that this master has met has lost those jobs since, unless it is waited for.
        return self.takes_up(join) and (not known.machine or node.doubtful)

    def known(self, number: int) -> tuple[str, tuple[str, ...]]:
        """Host name and hardware addresses of a number's last slave; empty where there was none."""
        return self._known.get(number, _Known()).identity

    def remember(self, number: int, hostname: str, macs: tuple[str, ...]) -> None:
        """Have that slave get this number again."""
        self._known[number] = _Known((hostname, macs))

    def _number(self, join: Join) -> int:
        configured = self.config().number_for(join.macs)
        if configured is not None:
            return configured
        if join.wanted is not None:
            if join.wanted < 0:
                raise NotAdmitted(f"{join.wanted} is no number of a slave")
            return join.wanted
        identity = (join.hostname, join.macs)
        for number, known in sorted(self._known.items()):
            if known.identity == identity and self.table.get(number).session is None:
                return number
        reserved = {entry.number for entry in self.config().entries}
        for number in range(self.table.limit):
            if number not in reserved and number not in self.table:
                return number
        raise NotAdmitted(f"all {self.table.limit} node numbers are taken")

    def unbar(self, number: int) -> None:
        """Let the parked slaves of a node try again."""
        event = self._unbarred.pop(number, None)
        if event is not None:
            event.set()

    async def wait_unbarred(self, number: int) -> None:
        """Wait for `unbar`."""
        await self._unbarred.setdefault(number, trio.Event()).wait()
