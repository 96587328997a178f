"""Who may do what to a process, and with whose rights files are opened."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any

from bpfs.errors import BpfsError
from bpfs.nodes.registry import MASTER, Node
from bpfs.nodes.states import NodeState
from bpfs.procs.process import Process
from bpfs.procs.table import read_identity
from bpfs.tree.base import Caller


@dataclass(frozen=True, slots=True)
class Rights:
    """Whose rights open the file."""

    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def of(cls, caller: Caller) -> Rights:
        """The caller's; the groups are those of his process, as far as it can be seen."""
        try:
            identity = read_identity(caller.pid)
        except BpfsError:
            return cls(caller.uid, caller.gid, ())
        return cls(caller.uid, caller.gid, tuple(identity.groups) if identity.uid == caller.uid else ())

    @property
    def arguments(self) -> dict[str, Any]:
        """For an engine's operation."""
        return {"uid": self.uid, "gid": self.gid, "groups": list(self.groups)}


def writes_itself(caller: Caller, proc: Process) -> bool:
    """Whether the caller is the process that it wants moved, waiting in its own write."""
    return caller.pid == proc.pid and caller.node == proc.place


def may_control(caller: Caller, proc: Process, code: int = errno.EACCES) -> None:
    """Raises BpfsError where the caller is neither root nor the process's owner."""
    if caller.uid not in (0, proc.identity.uid):
        raise BpfsError(code, f"process {proc.pid} belongs to another user")


def bound(proc: Process) -> str:
    """Why no node could ever take this process, in words; empty for all but a few."""
    if proc.identity.kernel:
        return "it is a kernel thread"
    if proc.pid == 1:
        return "it is the init of its machine"
    if proc.pid == os.getpid():
        return "it is the daemon that would move it"
    return ""


def admits(node: Node, caller: Caller, proc: Process) -> None:
    """Checks that a node takes a process now.

    Raises:
        BpfsError: EHOSTDOWN; EACCES where its x bits, or its being unavailable, keep the caller out.
    """
    if node.number == MASTER or caller.uid == 0:
        if node.number != MASTER and not node.holds_jobs:
            raise BpfsError(errno.EHOSTDOWN, f"node {node.number} is {node.state.value}: {node.reason}".rstrip(": "))
        return
    if not node.state.holds_jobs:
        raise BpfsError(errno.EHOSTDOWN, f"node {node.number} is {node.state.value}: {node.reason}".rstrip(": "))
    if node.state is NodeState.UNAVAILABLE:
        raise BpfsError(errno.EACCES, f"node {node.number} is unavailable: {node.reason}")
    groups = proc.identity.groups | {caller.gid}
    bit = 0o100 if caller.uid == node.uid else 0o010 if node.gid in groups else 0o001
    if not node.mode & bit:
        raise BpfsError(errno.EACCES, f"node {node.number} does not admit this user (mode {node.mode:03o})")
