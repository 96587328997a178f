# SPDX-License-Identifier: GPL-2.0-or-later
"""The lines that files of /bpfs consist of, as records: what the client library and the commands read.

The formats are those of bpfs(5). Standard library only.
"""

from __future__ import annotations

import re
from errno import EINVAL
from typing import NamedTuple

from bpfs.errors import BpfsError

_FIGURE = re.compile(r"([a-z_]+)=([0-9.]+)(?: |$)")


class NodeStatus(NamedTuple):
    """One line of /bpfs/status."""

    number: int
    state: str
    mode: int  # the x bits, e.g. 0o111
    owner: str  # a name, or a number where the user has none
    group: str
    address: str  # empty where the node has never been seen


class Stay(NamedTuple):
    """One line of a process's history."""

    node: int
    text: str  # the line itself: since when, freeze in ms, bytes


class Move(NamedTuple):
    """One line of nodes/N/migrate: how a move to the node went."""

    pid: int
    outcome: str  # "ok" or the name of an errno
    figures: dict[str, float]  # freeze_ms, total_ms, bytes
    reason: str  # why it went wrong, in words


class ExitStatus(NamedTuple):
    """How a process ended: `code` of exit(3), or the `signal` that killed it; the other is None."""

    code: int | None
    signal: int | None

    @property
    def returncode(self) -> int:
        """As subprocess has it: the exit code, or the signal negated."""
        return self.code if self.code is not None else -(self.signal or 0)


class Event(NamedTuple):
    """One line of an events file.

    `kind` is "node" or "process", `number` which one, `what` the rest of the line. A reader that was too slow gets the
    kind "lost" and how many lines it missed.
    """

    kind: str
    number: int
    what: str


def parse_status(text: str) -> list[NodeStatus]:
    """Reads the text of /bpfs/status, in its order.

    Raises:
        BpfsError: EINVAL, a line is none of a node.
    """
    found = []
    for line in text.splitlines():
        try:
            number, state, mode, owner, group, *address = line.split()
            found.append(NodeStatus(int(number), state, int(mode, 8), owner, group, "".join(address).strip("-")))
        except ValueError:
            raise BpfsError(EINVAL, f"'{line[:80]}' is no line of a status file") from None
    return found


def parse_event(line: str) -> Event:
    """Reads a line of an events file."""
    kind, _, rest = line.partition(" ")
    number, _, what = rest.partition(" ")
    return Event(kind, int(number), what) if number.removeprefix("-").isdigit() else Event("other", 0, line)


def parse_move(line: str) -> Move:
    """Reads a line of nodes/N/migrate.

    Raises:
        BpfsError: EINVAL, it is none.
    """
    pid, _, rest = line.partition(" ")
    outcome, _, rest = rest.partition(" ")
    figures: dict[str, float] = {}
    while match := _FIGURE.match(rest):
        figures[match[1]] = float(match[2])
        rest = rest[match.end() :]
    if not pid.isdigit() or not outcome:
        raise BpfsError(EINVAL, f"'{line[:80]}' is no line of a migrate file")
    return Move(int(pid), outcome, figures, rest.strip())


def parse_exit(text: str) -> ExitStatus:
    """Reads ``exit 3`` or ``signal 15``.

    Raises:
        BpfsError: EINVAL, it is neither.
    """
    word, _, number = text.partition(" ")
    if word not in ("exit", "signal") or not number.split()[:1] or not number.split()[0].isdigit():
        raise BpfsError(EINVAL, f"'{text[:80]}' is no exit status")
    value = int(number.split()[0])
    return ExitStatus(value, None) if word == "exit" else ExitStatus(None, value)
