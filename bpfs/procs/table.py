"""The process table: every process that is away, on its way, or known from an earlier stay."""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Callable, Iterator

from bpfs.errors import BpfsError
from bpfs.procs.process import MASTER, ExitStatus, Identity, Pid, Process, ProcState
from engine.linux import procfs
from engine.linux.procfs import own_file

PF_KTHREAD = 0x00200000  # include/linux/sched.h; the flags of proc(5)


def read_identity(pid: int) -> Identity:
    """Reads who a process of this machine is; see proc(5) for the formats.

    Raises:
        BpfsError: ESRCH, there is no such process (or it is a zombie's pid).
    """
    try:
        status = procfs.parse_status(procfs.read(own_file(pid, "status")))
        stat = procfs.read(own_file(pid, "stat")).rpartition(b")")[2].decode().split()
        cmdline = procfs.read(f"/proc/{pid}/cmdline")
    except OSError:
        raise BpfsError(errno.ESRCH, f"there is no process {pid}") from None
    if int(status["Tgid"]) != pid:
        raise BpfsError(errno.ESRCH, f"{pid} is a thread of process {status['Tgid']}")
    if stat[0] in "ZX":
        raise BpfsError(errno.ESRCH, f"process {pid} has ended")
    return Identity(
        uid=int(status["Uid"].split()[0]),
        gid=int(status["Gid"].split()[0]),
        ppid=int(stat[1]),
        pgid=int(stat[2]),
        sid=int(stat[3]),
        groups=frozenset(int(word) for word in status["Groups"].split()),
        start=int(stat[19]),
        cmdline=cmdline,
        kernel=bool(int(stat[6]) & PF_KTHREAD),
    )


KEPT = 64  # processes of whose end there is something to say


class ProcTable:
    """The processes the cluster knows, by pid."""

    def __init__(self, publish: Callable[[str, int], object]) -> None:
        """`publish(line, node)` is called with a line for the events files at every change."""
        self._known: dict[Pid, Process] = {}
        self._at: defaultdict[int, dict[Pid, Process]] = defaultdict(dict)  # these, by place
        self._told_of: dict[Pid, Process] = {}  # ended, and why; oldest first
        self._publish = publish

    def __iter__(self) -> Iterator[Process]:
        return iter(list(self._known.values()))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, pid: int) -> Process | None:
        """The process the cluster knows under this pid, or None."""
        proc = self._known.get(Pid(pid))
        if proc is not None and proc.place == MASTER and proc.state is ProcState.RUNNING:
            return self._still_home(proc)
        return proc

    def known(self, pid: int) -> Process | None:
        """What the table has under this pid, unchecked."""
        return self._known.get(Pid(pid))

    def find(self, pid: int) -> Process:
        """The process with this pid, known or any other of the master's.

        Raises:
            BpfsError: ESRCH.
        """
        return self.get(pid) or Process(Pid(pid), read_identity(pid))

    def find_or_recall(self, pid: int) -> Process:
        """As `find`; where there is no such process, one that has ended and of whose end there is something to say.

        Raises:
            BpfsError: ESRCH.
        """
        try:
            return self.find(pid)
        except BpfsError:
            if (ended := self._told_of.get(Pid(pid))) is None:
                raise
            return ended

    def away_on(self, node: int) -> list[Process]:
        """The processes that are away on `node`, in order of their pids."""
        if node == MASTER:
            return []
        return sorted(self._at[node].values(), key=lambda proc: proc.pid)

    def add(self, proc: Process) -> None:
        """Takes a process into the table, in the place of another with its pid."""
        if (before := self._known.get(proc.pid)) is not None:
            self._drop(before)
        self._known[proc.pid] = self._at[proc.place][proc.pid] = proc
        proc.moved = self._moved

    def _moved(self, proc: Process, before: int) -> None:
        self._at[before].pop(proc.pid, None)
        self._at[proc.place][proc.pid] = proc

    def _drop(self, proc: Process) -> None:
        del self._known[proc.pid]
        self._at[proc.place].pop(proc.pid, None)
        proc.moved = None

    def changed(self, proc: Process, what: str) -> None:
        """Tells the readers of events what happened to a process."""
        self._publish(f"process {proc.pid} {what}", proc.place)

    def end(self, proc: Process, status: ExitStatus) -> None:
        """Ends a process and forgets its pid."""
        if proc.state is ProcState.ENDED:
            return
        proc.end(status)
        if proc.why:
            self._told_of.pop(proc.pid, None)
            self._told_of[proc.pid] = proc
            for pid in list(self._told_of)[:-KEPT]:
                del self._told_of[pid]
        if self._known.get(proc.pid) is proc:
            self._drop(proc)
        self.changed(proc, f"{status}: {proc.why}" if proc.why else str(status))

    def forget(self, proc: Process) -> None:
        """Drops a process that lives on at home, as any other of the master's."""
        if self._known.get(proc.pid) is proc:
            self._drop(proc)

    def _still_home(self, proc: Process) -> Process | None:
        # Nobody reports the end of a process at home, and its pid may be another's by now. What it is may change, too.
        try:
            now = read_identity(proc.pid)
        except BpfsError:
            self.forget(proc)
            return None
        if now.start != proc.identity.start:
            self.forget(proc)
            return None
        proc.identity = now
        return proc
