"""The node's job space: what its init reports goes to the master, what the master wants goes to the jobs."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from errno import EFBIG, EINVAL, EIO, ESRCH
from functools import partial
from pathlib import Path

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.slave.births import BirthWatch
from bpfs.slave.keeper import Keeper
from bpfs.slave.line import Line
from bpfs.slave.spool import Slot, Source
from bpfs.wire.messages import (
    JOBS_AT_ONCE,
    MM_FILES,
    PROC_FILES,
    AskFree,
    DropPlaceholder,
    HostPidIs,
    HostPidOf,
    JobsStatus,
    JobsStatusAre,
    JobStatus,
    JobStatusIs,
    KillAll,
    Signal,
    StandIn,
    StandInLeads,
)
from engine.jobspace import Clocks, JobSpace, Kind, Report
from engine.linux import pidfd, procfs

_log = log.get("jobs")

SI_QUEUE = -1  # sigqueue(3): the value counts
STOPS = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT})
DIRECT = STOPS | {signal.SIGKILL}  # these keep their order whoever sends them, and nobody sees the sender of most
SWEEP_AFTER = 0.25  # seconds from a job's end until placeholders are looked over: the next one may need the very same
RESERVED_S = 5.0  # between looks whether pids are still to be kept: a node has plenty
ASK_S = 10.0  # for the master to answer
TEXT_LIMIT = 900_000  # bytes of all the files of one answer: a message takes 1 MiB


class _Dropped(set[int]):
    """Placeholders whose end is nobody's business; the next life is to know of them."""

    def __init__(self, keeper: Keeper, known: Iterable[int] = ()) -> None:
        super().__init__(known)
        self._keeper = keeper

    def add(self, pid: int) -> None:
        self._keeper.keep(("dropped", pid))
        super().add(pid)

    def discard(self, pid: object) -> None:
        assert isinstance(pid, int)
        self._keeper.drop(("dropped", pid))
        super().discard(pid)


class Jobs:
    """One job space and its messages.

    Attributes:
        ordered: pids of jobs that were born by order (bpfs/slave/makejob.py): their placeholders serve the next, too.
    """

    def __init__(self, space: JobSpace, block: range, link: Line) -> None:
        self._space = space
        self._block = block
        self._link = link
        self.closed = False
        self.ordered: set[int] = set()
        self._unswept = False  # placeholders may be of no use any more
        self._sweep_soon = trio.Event()
        self.births: BirthWatch | None = None

    @classmethod
    def start(
        cls, block: range, link: Line, keeper: Keeper, root: str | None = None, clocks: Clocks | None = None,
        taken: Mapping[int, int] | None = None,
    ) -> Jobs:  # fmt: skip
        """Make the job space, with `root` as its root where it is not to have ours, and with the master's clocks where
        they are not ours either; takes about 3 ms.

        Args:
            taken: owners of pids of the block that processes elsewhere have.

        Raises:
            BpfsError: with a sentence.
        """
        try:
            space = JobSpace.start(block, root, clocks, keeper.spawn, _Dropped(keeper))
            if clocks is not None and not space.has_clocks:
                _log.warning("the kernel has no time namespaces: monotonic clocks of processes that come here jump")
            keeper.keep(("space", space.has_block), space.init, [space.reports.fileno()])
            space.reserve(taken or {})
            return cls(space, block, link)
        except (OSError, RuntimeError) as error:
            raise BpfsError(EIO, f"no job space can be made: {error}") from None

    @classmethod
    def adopt(cls, block: range, link: Line, keeper: Keeper) -> Jobs:
        """Take up the job space of the life before.

        Raises:
            BpfsError: it has ended.
        """
        ((has_block, kept),) = keeper.of("space")
        reports = socket.socket(fileno=kept.fds[0])
        dropped = _Dropped(keeper, [pid for pid, _ in keeper.of("dropped")])
        try:
            jobs = cls(JobSpace.adopt(int(kept.value), reports, bool(has_block), dropped), block, link)
            jobs.take_reports()
            jobs._unswept = True
            for pid in dropped.difference(jobs.space.placeholders()):
                dropped.discard(pid)  # it has ended, and its pid may be a job's one day
            return jobs
        except OSError as error:
            raise BpfsError(EIO, f"the job space has ended: {error}") from None

    @property
    def init(self) -> int:
        """HostPid of the job space's init."""
        return self._space.init

    @property
    def space(self) -> JobSpace:
        """The engine's own object."""
        return self._space

    async def run(self) -> str:
        """Pass reports on; returns, with the reason, when the job space has died."""
        while True:
            try:
                await trio.lowlevel.wait_readable(self._space.reports)
            except (trio.ClosedResourceError, OSError):
                break
            if self.closed:  # between a report's coming and this task's turn
                break
            told = self.take_reports()
            if told is None:
                return "the init of the job space has died"
            for slot in told:
                self._link.tell(slot)
            children = [report.pid for slot in told if (report := Report.parse(slot.data)).kind is Kind.CHILD]
            if children:
                self._unswept = True
                if self.ordered.issuperset(children):
                    self._sweep_soon.set()
                else:
                    self.sweep()
        return "the job space is closed"

    async def keep_swept(self) -> None:
        """Sweep a moment after jobs have ended that were born by order."""
        while True:
            await self._sweep_soon.wait()
            self._sweep_soon = trio.Event()
            await trio.sleep(SWEEP_AFTER)
            if self.closed:
                return
            with suppress(OSError):
                self.ordered.intersection_update(self._space.processes())
            self.sweep()

    async def keep_reserved(self) -> None:
        """Give pids free that were kept for processes elsewhere, once these are no more."""
        while not self.closed:
            with suppress(OSError, BpfsError):  # the master, or all, is gone
                if kept := self._space.reserved():
                    answer = await self._link.request(AskFree(tuple(kept)), ASK_S)
                    self._space.drop_unneeded_placeholders(frozenset(answer.pids))
            await trio.sleep(RESERVED_S)

    def sweep(self) -> None:
        """Drop placeholders that nobody needs, if jobs have ended: those of a process that comes must not be in the way
        of its own."""
        if not self._unswept or self.closed:
            return
        with suppress(OSError):
            self._unswept = self._space.drop_unneeded_placeholders() is None
            if self._unswept:  # a process is being born
                self._sweep_soon.set()

    def take_reports(self) -> list[Slot] | None:
        """All reports that have come in, without waiting; None where there is none, and its init has died."""
        taken: list[Slot] = []
        while True:
            try:
                slot = self._link.receive(self._space.reports, Source.REPORT)
            except BlockingIOError:
                return taken
            if slot is None:
                return taken or None
            if self._space.is_ours(Report.parse(slot.data)):
                self._link.drop(slot)
            else:
                taken.append(slot)

    def kill(self) -> None:
        """Send SIGKILL to every job, and wait for none."""
        if not self.closed:
            with suppress(ProcessLookupError):
                pidfd.send(self._space.init_pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Kill every job; returns when all are dead."""
        if not self.closed:
            self.closed = True
            with suppress(OSError):
                trio.lowlevel.notify_closing(self._space.reports)
            self._space.close()

    def present(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What lives here now, and what of that is stopped."""
        alive = tuple(self._space.processes())
        return alive, tuple(pid for pid in alive if self.is_stopped(pid))

    def is_native(self, pid: int) -> bool:
        """Whether a job was forked here, and has not come from elsewhere."""
        return pid in self._block

    def send(self, pid: int, signo: int) -> None:
        """Send a signal to a job in nobody's name; one that has ended gets none."""
        with suppress(ProcessLookupError):
            process = self._space.open_process(pid)
            try:
                pidfd.send(process, signo)
            finally:
                os.close(process)

    def is_stopped(self, pid: int) -> bool:
        """Whether a job stands still by a signal of job control."""
        hostpid = self._space.hostpid(pid)
        try:
            return hostpid is not None and procfs.is_stopped(hostpid)
        except OSError:
            return False  # it has just ended

    # -- handlers ----------------------------------------------------------------------------------

    async def signal(self, message: Signal) -> None:
        """Handler: send a signal to a job."""
        if not 0 <= message.sig <= 64:
            raise BpfsError(EINVAL, f"{message.sig} is no signal")
        value = message.value if message.si_code == SI_QUEUE else None
        if message.si_pid and message.sig not in DIRECT:
            if self._space.send_as(message.si_pid, message.pid, message.sig, value):
                return
            send_for = partial(self._space.send_for, message.si_pid, message.si_uid, message.pid, message.sig, value)
            if await trio.to_thread.run_sync(send_for):
                return
        try:
            process = self._space.open_process(message.pid)
            try:
                if message.si_code == SI_QUEUE:
                    pidfd.queue(process, message.sig, message.value, message.si_uid)
                else:
                    pidfd.send(process, message.sig)
            finally:
                os.close(process)
            if self.births is not None and message.sig in STOPS:
                self.births.look(message.pid)
        except ProcessLookupError:
            raise BpfsError(ESRCH, f"there is no process {message.pid} on this node") from None

    def kill_all(self, _message: KillAll) -> None:
        """Handler: kill all jobs; the job space stays."""
        self._space.kill_all()

    def stand_in(self, message: StandIn) -> None:
        """Handler: a child of a job did something elsewhere; the job shall find that when it waits."""
        try:
            self._space.act_for(message.pid, message.code, message.status, message.heard)
        except ProcessLookupError:
            raise BpfsError(ESRCH, f"nothing stands for process {message.pid} on this node") from None

    def stand_in_leads(self, message: StandInLeads) -> None:
        """Handler: a child of a job leads a group or session elsewhere; here it does so, too."""
        try:
            self._space.lead(message.pid, message.session)
        except ProcessLookupError:
            raise BpfsError(ESRCH, f"nothing stands for process {message.pid} on this node") from None

    def hostpid(self, message: HostPidOf) -> HostPidIs:
        """Handler: a job's pid as engine workers here see it."""
        return HostPidIs(self._space.hostpid(message.pid) or 0)

    def drop_placeholder(self, message: DropPlaceholder) -> None:
        """Handler: the process that a placeholder stands for has ended."""
        with suppress(ProcessLookupError):
            self._space.drop_placeholder(message.pid)

    async def status(self, message: JobStatus) -> JobStatusIs:
        """Handler: files of /proc of a job, from the jobs' own /proc: pids in them are the cluster's."""
        if not set(message.names) <= PROC_FILES:
            raise BpfsError(EINVAL, f"a node does not tell all of {' '.join(message.names)}")
        try:
            slow = MM_FILES.intersection(message.names)
            read = partial(self._files, message.pid, message.names)
            texts = await trio.to_thread.run_sync(read, abandon_on_cancel=True) if slow else read()
        except OSError:
            raise BpfsError(ESRCH, f"there is no process {message.pid} on this node") from None
        if sum(map(len, texts)) > TEXT_LIMIT:
            raise BpfsError(EFBIG, f"{' '.join(message.names)} of process {message.pid} is longer than a message")
        return JobStatusIs(texts)

    def statuses(self, message: JobsStatus) -> JobsStatusAre:
        """Handler: the same of many jobs, those that have ended left empty."""
        if not set(message.names) <= PROC_FILES - MM_FILES or len(message.pids) > JOBS_AT_ONCE:
            raise BpfsError(EINVAL, f"a node does not tell {' '.join(message.names)} of {len(message.pids)} jobs")
        texts: list[bytes] = []
        for pid in message.pids:
            try:
                texts += self._files(pid, message.names)
            except OSError:
                texts += [b""] * len(message.names)
        return JobsStatusAre(tuple(texts))

    def _files(self, pid: int, names: tuple[str, ...]) -> tuple[bytes, ...]:
        folder = Path(f"/proc/{self._space.init}/root/proc/{pid}")
        return tuple((folder / name).read_bytes() for name in names)
