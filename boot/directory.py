"""Which machine is which node, as the boot server knows it. Filled from the cluster's configuration by its caller."""

from __future__ import annotations

import enum
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from boot.reports import Report, Reporter

UNKNOWN_MOST = 256
"""Unknown machines that are remembered; the one that was silent longest is forgotten first."""


class Assign(enum.Enum):
    """What happens to a machine that no `node` line names, by the word of the configuration (`nodeassign`)."""

    APPEND = "append"  # it gets the next free number, for good
    MANUAL = "manual"  # it is listed, and waits for the administrator
    LOCKED = "locked"  # nothing: it is not even listed


@dataclass(slots=True)
class Unknown:
    """A machine that asked and is no node: how often, and when last (seconds since the epoch)."""

    count: int = 0
    last: float = 0.0


@dataclass(slots=True)
class Directory:
    """The nodes.

    Attributes:
        numbers: hardware addresses (text) and their nodes' numbers.
        address: the network address of a number; None where the configuration has none for it.
        assign: what to do with others.
        append: gives an unknown machine a number and keeps it for good, or None where all are taken.
        texts: what phase 2 of a node has to know.
        command_line: words for the kernel of phase 2.
    """

    numbers: Mapping[str, int]
    address: Callable[[int], str | None]
    assign: Assign
    append: Callable[[str], int | None]
    texts: Callable[[int], dict[str, str]]
    command_line: str = ""
    unknown: OrderedDict[str, Unknown] = field(default_factory=OrderedDict)

    def number(self, mac: str) -> int | None:
        """The number of a machine that asks; new ones are dealt with as the configuration says."""
        number = self.numbers.get(mac)
        if number is None and self.assign is Assign.APPEND:
            number = self.append(mac)
        if number is None and self.assign is Assign.MANUAL:
            self._remember(mac)
        return number

    def found(self, mac: str, reporter: Reporter) -> tuple[int, str] | None:
        """Number and address of a machine that asks, told to the reporter; None where it is not answered."""
        number = self.number(mac)
        if number is None:
            if mac in self.unknown:
                entry = self.unknown[mac]
                reporter.tell(Report.UNKNOWN, mac, entry.count, f"{entry.last:.0f}")
            return None
        address = self.address(number)
        if address is None:
            reporter.tell(Report.LOG, number, f"{mac} asks, but iprange has no address for node {number}")
            return None
        reporter.tell(Report.ASKED, number, mac, address)
        return number, address

    def _remember(self, mac: str) -> None:
        entry = self.unknown.setdefault(mac, Unknown())
        entry.count += 1
        entry.last = time.time()
        self.unknown.move_to_end(mac)
        while len(self.unknown) > UNKNOWN_MOST:
            self.unknown.popitem(last=False)

    def by_address(self, address: str) -> int | None:
        """The number of the node that has this network address."""
        for number in self.numbers.values():
            if self.address(number) == address:
                return number
        return None

    def macs_of(self, number: int) -> list[str]:
        """The hardware addresses of a node."""
        return [mac for mac, owner in self.numbers.items() if owner == number]
