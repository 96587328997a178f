"""The states of a node, and who may change them: one table.

A node is never moved between states but by `check`: every change names its cause, and what the table lacks is
refused.
"""

from __future__ import annotations

import enum
from errno import EINVAL

from bpfs.errors import BpfsError


class NodeState(enum.Enum):
    """The state of a node, by the name that `nodes/N/state` shows."""

    DOWN = "down"  # no link; no new processes. Left when a slave joins, unless the administrator keeps the node down
    BOOT = "boot"  # its machine boots, or its slave has joined and gets ready; left by Ready, Fault, or the link's end
    UNAVAILABLE = "unavailable"  # linked and sound, takes new processes from root only; the administrator ends it
    UP = "up"  # linked, takes processes from whomever its mode admits
    ERROR = "error"  # linked, but cannot hold jobs; left by a new start of the slave, or the administrator
    REBOOT = "reboot"  # told to start again, link about to end; becomes down when it has ended
    HALT = "halt"  # told to halt, link about to end; becomes down when it has ended
    PWROFF = "pwroff"  # told to power off, link about to end; becomes down when it has ended

    @property
    def linked(self) -> bool:
        """Whether a slave is connected and takes requests."""
        return self in _LINKED

    @property
    def holds_jobs(self) -> bool:
        """Whether processes may live on the node."""
        return self in (NodeState.UP, NodeState.UNAVAILABLE)


class Cause(enum.Enum):
    """Who changes a state."""

    ADMIN = "the administrator"  # root wrote to the state file
    BOOTING = "its machine boots"  # bpbootd answered it
    JOINED = "the slave joined"  # a slave proved the key and was given the number
    READY = "the slave is ready"  # its job space and engine are there
    AGAIN = "its start is tried again"  # some time after it has failed
    FAULT = "the slave is at fault"  # it said that it cannot hold jobs
    LOST = "the link was lost"  # closed, or silent for longer than the lease and margin
    LEFT = "the slave left"  # it said good-bye after its last job had ended


_LINKED = frozenset({NodeState.BOOT, NodeState.UNAVAILABLE, NodeState.UP, NodeState.ERROR})
_ENDING = frozenset({NodeState.REBOOT, NodeState.HALT, NodeState.PWROFF})


def _transitions() -> dict[tuple[NodeState, NodeState], frozenset[Cause]]:
    # One line a rule: from, to, causes.
    s, c = NodeState, Cause
    rules: list[tuple[frozenset[NodeState], NodeState, set[Cause]]] = [
        (frozenset({s.DOWN}), s.BOOT, {c.JOINED, c.BOOTING}),
        (frozenset({s.BOOT}), s.UP, {c.READY}),
        (frozenset({s.BOOT}), s.UNAVAILABLE, {c.READY}),  # as the administrator has wished before
        (frozenset({s.BOOT, s.UP, s.UNAVAILABLE}), s.ERROR, {c.FAULT}),
        (frozenset({s.UP, s.ERROR}), s.UNAVAILABLE, {c.ADMIN}),
        (frozenset({s.UNAVAILABLE}), s.UP, {c.ADMIN}),
        # The last stage of its start is done once more: after a while, or by the administrator's "the fault is mended".
        (frozenset({s.ERROR}), s.BOOT, {c.ADMIN, c.AGAIN}),
        (frozenset({s.UP, s.UNAVAILABLE}), s.ERROR, {c.ADMIN, c.FAULT}),
        (_LINKED, s.DOWN, {c.ADMIN, c.LOST, c.LEFT}),
        (_ENDING, s.DOWN, {c.ADMIN, c.LOST, c.LEFT}),
        (_LINKED, s.REBOOT, {c.ADMIN}),
        (_LINKED, s.HALT, {c.ADMIN}),
        (_LINKED, s.PWROFF, {c.ADMIN}),
    ]
    table: dict[tuple[NodeState, NodeState], frozenset[Cause]] = {}
    for sources, target, causes in rules:
        for source in sources:
            table[source, target] = table.get((source, target), frozenset()) | causes
    return table


TRANSITIONS = _transitions()
"""(from, to) -> who may cause it. What is not here does not happen."""


def parse_state(word: str) -> NodeState:
    """The state with this name.

    Raises:
        BpfsError: EINVAL, naming the known ones.
    """
    try:
        return NodeState(word)
    except ValueError:
        known = " ".join(state.value for state in NodeState)
        raise BpfsError(EINVAL, f"{word[:40]!r} is no state of a node; known: {known}") from None


def check(number: int, old: NodeState, new: NodeState, cause: Cause) -> None:
    """Let a change pass that the table knows.

    Raises:
        BpfsError: EINVAL, with a sentence that names node, states and cause.
    """
    if cause not in TRANSITIONS.get((old, new), frozenset()):
        raise BpfsError(
            EINVAL,
            f"node {number} cannot go from {old.value} to {new.value} because {cause.value}"
            if cause is not Cause.ADMIN
            else f"node {number} cannot be set from {old.value} to {new.value}",
        )
