"""What users want for processes as long as these live, wherever they are and whichever master there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bpfs.errors import BpfsError
from bpfs.procs.ledger import Ledger, Part
from bpfs.procs.process import Pid, Process, ProcState
from bpfs.procs.table import ProcTable, read_identity


class Wishes:
    """One part of the ledger: a value a process, which is known again by its pid and start time."""

    def __init__(self, table: ProcTable, ledger: Ledger, part: Part) -> None:
        self._table = table
        self._ledger = ledger
        self._part = part
        self._of: set[Process] = set()

    def put(self, proc: Process, value: Any) -> None:
        """It is wanted from now on."""
        for other in [one for one in self._of if one is not proc and not lives(one)]:
            self.drop(other)
        self._of.add(proc)
        self._ledger.put(self._part, proc.pid, [proc.identity.start, value])

    def drop(self, proc: Process) -> None:
        """It is wanted no more."""
        if proc in self._of:
            self._of.remove(proc)
            self._ledger.drop(self._part, proc.pid)

    def left(self) -> Iterator[tuple[Process, Any]]:
        """What was wanted when an earlier master died, of processes that still live; these are in the table then."""
        for pid, (start, value) in self._ledger.left(self._part).items():
            proc = self._table.known(pid) or _at_home(pid)
            if proc is None or proc.identity.start != start:
                self._ledger.drop(self._part, pid)
                continue
            self._table.add(proc)
            self._of.add(proc)
            yield proc, value


def lives(proc: Process) -> bool:
    """Whether it, or its ghost, is there."""
    try:
        return proc.state is not ProcState.ENDED and read_identity(proc.pid).start == proc.identity.start
    except BpfsError:
        return False


def _at_home(pid: int) -> Process | None:
    try:
        return Process(Pid(pid), read_identity(pid))
    except BpfsError:
        return None
