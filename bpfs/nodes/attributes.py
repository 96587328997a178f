# SPDX-License-Identifier: GPL-2.0-or-later
"""Extended attributes of nodes/N: `bproc.state` and `bproc.addr`, and what administrators note down as `bproc.*`."""

from __future__ import annotations

from collections.abc import Callable
from errno import E2BIG, EACCES, EINVAL, ENODATA, ENOSPC, EPERM, ERANGE

from bpfs.errors import BpfsError
from bpfs.nodes.registry import Node
from bpfs.tree.base import Caller

PREFIX = "bproc."
MOST = 32  # of a node; these limits are BProc's
LONGEST_NAME = 63  # bytes behind the prefix
LONGEST_VALUE = 64  # bytes

_FIXED: dict[str, Callable[[Node], str]] = {
    "bproc.state": lambda node: node.state.value,
    "bproc.addr": lambda node: node.address,
}


class NodeAttributes:
    """What serves the extended attributes of the members of `nodes` (see `bpfs.tree.entries.Notes`)."""

    prefix = PREFIX

    def names(self, node: Node) -> list[str]:
        """All that a node has, in order."""
        return [*_FIXED, *sorted(node.notes)]

    def get(self, node: Node, name: str) -> bytes:
        """Raises BpfsError ENODATA."""
        if name in _FIXED:
            return _FIXED[name](node).encode()
        if name not in node.notes:
            raise BpfsError(ENODATA, f"node {node.number} has no {name}")
        return node.notes[name]

    def set(self, node: Node, caller: Caller, name: str, value: bytes) -> None:
        """Notes something down.

        Raises:
            BpfsError: EACCES neither root nor its owner; EPERM it is what the node is; ERANGE, E2BIG, ENOSPC.
        """
        self._may(node, caller, name)
        if not 0 < len(name.encode()) - len(PREFIX) <= LONGEST_NAME:
            raise BpfsError(ERANGE, f"names have up to {LONGEST_NAME} bytes after {PREFIX}")
        if len(value) > LONGEST_VALUE:
            raise BpfsError(E2BIG, f"values have up to {LONGEST_VALUE} bytes")
        if name not in node.notes and len(node.notes) >= MOST:
            raise BpfsError(ENOSPC, f"node {node.number} has {MOST} attributes already")
        node.notes[name] = value

    def remove(self, node: Node, caller: Caller, name: str) -> None:
        """Forgets it again. Raises BpfsError as `set`, ENODATA."""
        self._may(node, caller, name)
        if node.notes.pop(name, None) is None:
            raise BpfsError(ENODATA, f"node {node.number} has no {name}")

    def _may(self, node: Node, caller: Caller, name: str) -> None:
        if caller.uid not in (0, node.uid):
            raise BpfsError(EACCES, f"node {node.number} is not yours")
        if name in _FIXED:
            raise BpfsError(EPERM, f"{name} cannot be set")
        if not name.startswith(PREFIX):
            raise BpfsError(EINVAL, f"attributes are named {PREFIX}*")
