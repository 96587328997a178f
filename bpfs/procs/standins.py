"""What jobs do to what stands, on their node, for their children elsewhere: SIGKILL and SIGSTOP.

These two cannot be passed on by whom they reach. So jobwatch tells of stand-ins that have ended or stopped, and not by
order; who made them do so may have ended meanwhile (`kill -9 $!; exit`).
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from bpfs.errors import BpfsError
from bpfs.nodes.registry import Node, NodeTable
from bpfs.procs.families import Kin
from bpfs.procs.kernelfiles import ANSWER_S
from bpfs.procs.process import Pid, ProcState
from bpfs.procs.table import read_identity
from bpfs.tree.base import Caller
from bpfs.wire import messages
from engine.jobwatch import Record

if TYPE_CHECKING:
    from bpfs.procs.ghosts import Ghosts

INIT = 1  # of a node's jobs
EXPECTED = 2.0  # seconds at most for a parent that runs on the node to be known to
AGAIN = 0.002  # seconds between looks for it


@dataclass(frozen=True, slots=True)
class _Struck:
    """A stand-in, and what was done to it.

    Attributes:
        sure: the node saw how, and that it was nobody's order.
    """

    pid: int
    kin: Kin
    signo: signal.Signals
    sure: bool


class StandIns:
    """Of all nodes."""

    def __init__(self, ghosts: Ghosts, nodes: NodeTable) -> None:
        self._ghosts = ghosts
        self._nodes = nodes

    def stood(self, node: Node, record: Record) -> None:
        """A stand-in has ended, or was stopped. A plain function: what comes next of its parent may change that."""
        struck = self._struck(node, record)
        if struck is not None:
            self._ghosts.signals.in_order(record.pid, partial(self._pass_on, struck))
        elif self._ghosts.reports.expects(int(node.number)):
            self._ghosts.signals.in_order(record.pid, partial(self._await_parent, node, record))

    async def _await_parent(self, node: Node, record: Record) -> None:
        """Its parent may have come to the node a moment ago, which we are about to hear."""
        with trio.move_on_after(EXPECTED):
            while (struck := self._struck(node, record)) is None and self._ghosts.reports.expects(int(node.number)):
                await trio.sleep(AGAIN)
        if struck is not None:
            await self._pass_on(struck)

    def _struck(self, node: Node, record: Record) -> _Struck | None:
        kin = self._ghosts.families.kin(record.pid)
        if kin is None or kin.place != node.number:
            return None
        if record.state == "T":
            return _Struck(record.pid, kin, signal.SIGSTOP, sure=False)
        if record.code < 0 or record.code & 0x7F == signal.SIGKILL:
            return _Struck(record.pid, kin, signal.SIGKILL, sure=record.code >= 0)
        return None

    async def _pass_on(self, struck: _Struck) -> None:
        kin = struck.kin
        child = self._ghosts.table.known(struck.pid)
        if child is not None and (child.place == kin.place or child.state in (ProcState.MIGRATING, ProcState.ENDED)):
            return
        link = self._nodes.get(kin.place).live_session().link
        asked = messages.JobsStatus((INIT, kin.parent, struck.pid), ("status",))
        reply = await link.request(asked, ANSWER_S)
        assert isinstance(reply, messages.JobsStatusAre)
        init, parent, stand_in = reply.texts
        if not _lives(init) or (not struck.sure and not _lives(parent)):
            return  # the whole node may be ending just now
        if struck.signo == signal.SIGSTOP and b"\nState:\tT" not in stand_in:
            return  # it has been continued already, and that may have been passed on
        if child is not None and child.away:
            await self._ghosts.signals.signal(child, struck.signo, Caller(kin.parent, kin.uid, 0))
        elif _began(struck.pid) == kin.start is not None:
            os.kill(struck.pid, struck.signo)


def _began(pid: int) -> int | None:
    """Identity.start of a process of the master; None: there is none, or it has ended."""
    try:
        return read_identity(Pid(pid)).start
    except BpfsError:
        return None


def _lives(status: bytes) -> bool:
    """Whether the process of a /proc/PID/status is neither dead, nor ends, nor is about to by SIGKILL."""
    fields = dict(line.split(b":\t", 1) for line in status.splitlines() if b":\t" in line)
    if b"VmSize" not in fields:  # its memory goes first; pid 1 ends last
        return False
    pending = int(fields[b"ShdPnd"], 16) | int(fields[b"SigPnd"], 16)
    return fields[b"State"][:1] not in b"ZX" and not pending >> (signal.SIGKILL - 1) & 1
