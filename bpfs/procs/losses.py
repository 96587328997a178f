"""What becomes of processes whose node is lost: they end as killed, or come back from their last periodic image."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.nodes.registry import MASTER
from bpfs.nodes.states import NodeState
from bpfs.procs.away import Away
from bpfs.procs.ledger import Part
from bpfs.procs.process import OnLoss, Process, ProcState
from bpfs.procs.rights import may_control
from bpfs.procs.wishes import Wishes
from bpfs.tree.base import WriteRequest

if TYPE_CHECKING:
    from bpfs.procs.service import Procs

_log = log.get("procs")


class Losses:
    """The processes of lost nodes."""

    def __init__(self, procs: Procs) -> None:
        self._procs = procs
        self._wishes = Wishes(procs.table, procs.ghosts.ledger, Part.ONLOSS)

    def take_up(self) -> None:
        """Goes by what was chosen under an earlier master."""
        for proc, choice in self._wishes.left():
            proc.onloss = OnLoss(choice)

    def choose(self, proc: Process, request: WriteRequest) -> None:
        """Carries out a write to procs/PID/onloss.

        Raises:
            BpfsError: EINVAL; EACCES.
        """
        may_control(request.caller, proc)
        try:
            proc.onloss = OnLoss(request.text)
        except ValueError:
            known = ", ".join(choice.value for choice in OnLoss)
            raise BpfsError(errno.EINVAL, f"'{request.text[:40]}' is unknown; known: {known}") from None
        self._procs.table.add(proc)
        self._wishes.put(proc, proc.onloss.value)

    async def rescue(self, away: Away) -> bool:
        """Brings a process back on another node, when that was wished and there is an image; says whether it did."""
        proc = away.proc
        saved = self._procs.checkpoints.saved(proc)
        if proc.onloss is not OnLoss.RESTART or saved is None or away.ghost.gone:
            return False
        if self._procs.nodes.get(proc.place).runs_on:
            _log.warning("process %d: no restart: it may run on, on node %d", proc.pid, proc.place)
            return False
        proc.state, proc.progress = ProcState.MIGRATING, "restart after the loss of its node"
        lost = proc.place
        for node in self._procs.nodes:
            if node.number in (MASTER, lost) or node.state is not NodeState.UP:
                continue
            try:
                await self._procs.restarts.rescue(away, int(node.number), saved)
            except BpfsError as error:
                _log.info("process %d: no restart on node %d: %s", proc.pid, node.number, error)
                continue
            return self._back(proc, lost)
        proc.state = ProcState.RUNNING
        _log.warning("process %d: no node could take it after the loss of node %d", proc.pid, lost)
        return False

    def _back(self, proc: Process, lost: int) -> bool:
        proc.state = ProcState.RUNNING
        if proc.doom is not None:  # its ghost was killed meanwhile
            return False
        proc.why = ""  # what was to come from elsewhere was in the image
        self._procs.table.changed(proc, f"restarted on node {proc.place} after the loss of node {lost}")
        return True
