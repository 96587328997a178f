"""Signals that strict jobs send to whoever is not on their node: the sender's ghost makes the very call.

So the kernel of the master judges whether it may, siginfo has the sender's pid, and a ghost that is hit passes it on.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import trio

from bpfs.errors import BpfsError
from bpfs.nodes.registry import Node
from bpfs.procs.ghosts import Ghosts
from bpfs.wire.messages import JobCall, JobCallIs
from engine.linux.procfs import own_file

INIT = 1


class StrictCalls:
    """Serves JobCall."""

    def __init__(self, ghosts: Ghosts) -> None:
        self._ghosts = ghosts

    async def call(self, node: Node, message: JobCall) -> JobCallIs:
        """Handler. Raises BpfsError: the node is to let its kernel make the call."""
        sender = self._ghosts.stand_in(message.pid)
        if sender is None or sender.proc.place != node.number or not sender.real:
            raise BpfsError(errno.ESRCH, f"process {message.pid} of node {node.number} has no ghost")
        if message.target > 0:
            if self._is_on(node, message.target):
                return JobCallIs(0, 0)  # it has just come there
            targets = [message.target]
        else:
            found = await trio.to_thread.run_sync(_find, message.target, message.pid)
            targets = [pid for pid in found if not self._is_on(node, pid)]
        return JobCallIs(*await sender.ghost.strike(targets, message.sig, message.si_code, message.value))

    def _is_on(self, node: Node, pid: int) -> bool:
        proc = self._ghosts.table.known(pid)
        return proc is not None and proc.place == node.number


def _find(target: int, sender: int) -> list[int]:
    """The processes of this machine that kill(2) means by a negative target.

    For -1 that is everybody but init, the sender, this daemon with its helpers, as kernel threads are spared by the
    kernel, and what is in other pid namespaces: containers, and the jobs of virtual nodes, whose ghosts are here.
    """
    parents: dict[int, int] = {}
    groups: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                fields = Path(own_file(name, "stat")).read_text(errors="replace").rpartition(")")[2].split()
                parents[int(name)], groups[int(name)] = int(fields[1]), int(fields[2])
    if target != -1:
        return [pid for pid, group in groups.items() if group == -target]
    here = _namespace("self")
    return [
        pid
        for pid in parents
        if pid not in (INIT, sender) and not _descends(pid, os.getpid(), parents) and _namespace(pid) == here
    ]


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid > INIT and pid != ancestor:
        pid = parents.get(pid, 0)
    return pid == ancestor


def _namespace(pid: int | str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""
