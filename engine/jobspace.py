"""A node's job pid namespace as its daemon holds it: started, watched, signalled, ended.

pid 1 is nodeinit (csrc/nodeinit.c). Pids in this module are job pids (the cluster's) unless they are called host pids:
those are pids as the caller sees them.
"""

from __future__ import annotations

import enum
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from engine import placeholders, reserve
from engine.bearing import Bearer, Bearing
from engine.linux import nsfs, pidfd, process_vm, procfs
from engine.placeholders import INIT, Command

PROGRAM = Path(__file__).parent / "bin" / "nodeinit"
REPORT = struct.Struct("=IiiiiIQQqii")  # struct report of csrc/nodeinit.h
Spawn: TypeAlias = Callable[[Sequence[str], Mapping[str, str], Sequence[int]], int]
"""Starts a program by arguments, environment and descriptors; a word `@0` stands for the number of the first."""

_START_S = 20.0  # takes 3 ms; a loaded machine may need longer


class Kind(enum.IntEnum):
    """What a report is about (csrc/nodeinit.h)."""

    BORN = 0  # the starter's answer; never seen outside of `JobSpace.start`
    CHILD = 1  # a process ended, stopped or went on
    SIGNAL = 2  # a job sent a signal to a placeholder (or to nodeinit): it is meant for the process elsewhere
    READY = 3  # the namespace is set up; never seen outside of `JobSpace.start`
    FAILED = 4  # a placeholder could not be made


_START = (Kind.BORN, Kind.READY)


@dataclass(frozen=True, slots=True)
class Report:
    """One packet of nodeinit or a placeholder; all pids are job pids.

    Attributes:
        pid: CHILD: the child; SIGNAL: whom it was sent to; FAILED: who was to be made.
        reporter: nodeinit (1) or the placeholder that is the child's parent.
        code: CHILD: CLD_EXITED, CLD_KILLED, CLD_DUMPED, CLD_STOPPED or CLD_CONTINUED; SIGNAL: si_code.
        status: CHILD: exit status or signal; SIGNAL: the signal; FAILED: errno.
        uid: CHILD: the child's real uid; SIGNAL: the sender's.
        utime_us, stime_us, maxrss_kb: CHILD: its usage, with that of its own reaped children. SIGNAL, in stime_us: of a
            SIGCONT, the how manieth of its placeholder it is.
        value: SIGNAL: si_value of sigqueue(3).
        sender: SIGNAL: the sender's pid; 0 from outside of the namespace or from the kernel.
    """

    kind: Kind
    pid: int
    reporter: int
    code: int
    status: int
    uid: int
    utime_us: int
    stime_us: int
    maxrss_kb: int
    value: int
    sender: int

    @classmethod
    def parse(cls, packet: bytes) -> Report:
        """Read one packet. Raises struct.error or ValueError on anything that nodeinit does not send."""
        kind, pid, reporter, code, status, uid, utime, stime, maxrss, sender, _ = REPORT.unpack(packet)
        is_signal = kind == Kind.SIGNAL
        return cls(
            Kind(kind), pid, reporter, code, status, uid,
            0 if is_signal else utime, stime, maxrss, utime if is_signal else 0, sender,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Clocks:
    """CLOCK_MONOTONIC and CLOCK_BOOTTIME of a machine at one moment, or how far one machine's are ahead; in ns."""

    monotonic: int
    boottime: int

    @classmethod
    def now(cls) -> Clocks:
        """This machine's."""
        return cls(time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME))

    def offsets(self) -> str:
        """As `/proc/PID/timens_offsets` takes them (time_namespaces(7))."""
        return "".join(
            "{} {} {}\n".format(name, *divmod(value, 1_000_000_000))
            for name, value in (("monotonic", self.monotonic), ("boottime", self.boottime))
        )


class JobSpace:
    """The namespaces of one node's jobs, held by one daemon. Dies with it.

    Attributes:
        init: host pid of nodeinit.
        init_pidfd: readable when nodeinit, and so every job, is dead.
        reports: SEQPACKET socket of the reports, non-blocking; readable when there are some or nodeinit is dead.
        has_clocks: whether its jobs have clocks of their own.
        has_block: whether native forks get pids of the block (the kernel let us set ns_last_pid).
    """

    def __init__(self, init: int, reports: socket.socket, has_block: bool, dropped: set[int]) -> None:
        self.init = init
        self.init_pidfd = process_vm.pidfd_open(init)
        self.reports = reports
        self.has_block = has_block
        self.has_clocks = os.readlink(f"/proc/{init}/ns/time") != os.readlink("/proc/self/ns/time")
        self._namespace = nsfs.open_pid_namespace(init)
        self._dropped = dropped
        self._bearer = Bearer(init)

    @classmethod
    def start(
        cls, block: range, root: str | None = None, clocks: Clocks | None = None, spawn: Spawn | None = None,
        dropped: set[int] | None = None,
    ) -> JobSpace:  # fmt: skip
        """Make the namespaces and their pid 1. Blocks for about 3 ms.

        Call it from the main thread: the kernel kills nodeinit when the *thread* that started it ends.

        Args:
            block: the pids for what jobs fork natively.
            root: a mount point that is to be the jobs' root, with an empty directory `proc` in it; None: ours.
            clocks: how far the jobs' clocks are ahead of ours, in a time namespace of their own; None: not at all.
            spawn: starts a program whose end, and that of its children, is tied to another process than this one.
            dropped: keeps pids of placeholders whose end is nobody's business, where that is to outlive this object.

        Raises:
            OSError: no permission, no nodeinit program, or the kernel refused.
            TimeoutError: no answer.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("JobSpace.start must be called from the main thread")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                _run_starter(theirs, block, root, clocks, spawn or _run)
            ours.settimeout(_START_S)
            # The starter's and nodeinit's own packet come in any order.
            first, second = _receive(ours, *_START), None
            try:
                second = _receive(ours, *_START)
                born, ready = sorted((first, second), key=lambda report: report.kind)
                ours.setblocking(False)
                return cls(born.pid, ours, bool(ready.code), set() if dropped is None else dropped)
            except BaseException:
                for report in (first, second):
                    if report is not None and report.kind is Kind.BORN:
                        _end(report.pid)
                raise
        except BaseException:
            ours.close()
            raise

    @classmethod
    def adopt(cls, init: int, reports: socket.socket, has_block: bool, dropped: set[int]) -> JobSpace:
        """Hold a job space that another process has held before.

        Args:
            dropped: placeholders whose end is nobody's business.

        Raises:
            OSError: it has ended.
        """
        reports.setblocking(False)
        return cls(init, reports, has_block, dropped)

    def read_reports(self) -> list[Report]:
        """Everything that has come in, without waiting; deaths of placeholders that we dropped are left out."""
        found: list[Report] = []
        while True:
            try:
                packet = self.reports.recv(REPORT.size)
            except BlockingIOError:
                return found
            except ConnectionResetError:
                packet = b""
            if not packet:
                return found
            report = Report.parse(packet)
            if not self.is_ours(report):
                found.append(report)

    def is_ours(self, report: Report) -> bool:
        """Whether a report that was just read tells of the death of a placeholder that we dropped."""
        if report.kind != Kind.CHILD or report.pid not in self._dropped:
            return False
        if report.code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
            self._dropped.discard(report.pid)
        return True

    def hostpid(self, pid: int) -> int | None:
        """The host pid of a job; None when no process of this node has the pid."""
        return placeholders.outer_pid(self.init, self._namespace, pid)

    def jobpid(self, hostpid: int) -> int | None:
        """The inverse of `hostpid`; None when it is no process of this namespace."""
        try:
            return nsfs.inner_pid(self._namespace, hostpid)
        except NotImplementedError:
            if os.path.samestat(os.fstat(self._namespace), os.stat(f"/proc/{hostpid}/ns/pid")):
                return nsfs.pids_by_status(hostpid)[-1]
            return None

    def open_process(self, pid: int) -> int:
        """A pidfd of a job. Raises ProcessLookupError."""
        hostpid = self.hostpid(pid)
        if hostpid is None:
            raise ProcessLookupError(3, f"process {pid} is not on this node")
        handle = process_vm.pidfd_open(hostpid)
        if self.hostpid(pid) != hostpid:  # it ended and its host pid was given to another
            os.close(handle)
            raise ProcessLookupError(3, f"process {pid} is not on this node")
        return handle

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to one job. Raises ProcessLookupError."""
        handle = self.open_process(pid)
        try:
            pidfd.send(handle, number)
        finally:
            os.close(handle)

    def send_as(self, sender: int, pid: int, number: int, value: int | None) -> bool:
        """Send a signal to a job in the name of a process that is elsewhere, where something stands for that one here.

        Args:
            value: as with sigqueue(3); None: as kill(2) does.

        Returns:
            False where nothing stands for it (any more), or that is stopped: nothing was sent.
        """
        world = placeholders.World(self.init)
        try:
            ids = world.get(sender)
        finally:
            world.close()
        usable = ids is not None and ids.placeholder and sender != INIT and sender not in self._dropped
        hostpid = self.hostpid(sender) if usable else None
        if hostpid is None or self.hostpid(pid) is None:
            return False
        try:
            if procfs.is_stopped(hostpid):
                return False
            placeholders.send_as(self.init, hostpid, pid, number, value)
        except OSError:
            return False
        return True

    def send_for(self, sender: int, uid: int, pid: int, number: int, value: int | None) -> bool:
        """As `send_as`, in the name of a process of which nothing is here. Takes a millisecond, or a birth's time.

        Returns:
            False where nothing was sent: it would be ignored, or it could not be done.
        """
        if self.hostpid(sender) is not None or self._ignores(pid, number):
            return False
        made = partial(self._dropped.add, sender)
        return placeholders.send_for(self.init, sender, uid, pid, number, value, made)

    def _ignores(self, pid: int, number: int) -> bool:
        try:
            status = procfs.parse_status(procfs.read(f"/proc/{self.init}/root/proc/{pid}/status"))
            return not number or bool(int(status["SigIgn"], 16) >> (number - 1) & 1)
        except (OSError, KeyError):
            return True

    def bear(self, ids: tuple[int, int, int, int], uid: int, table: bytes, fds: list[int]) -> Bearing:
        """Order the birth of a job, see `Bearer.begin`; afterwards `settle`."""
        return self._bearer.begin(ids, uid, table, fds)

    def settle(self, bearing: Bearing) -> int:
        """See how a birth went; of one that failed nobody hears. See `Bearing.settle`."""
        return bearing.settle(self._dropped.add)

    def kill_all(self) -> None:
        """SIGKILL for every process but nodeinit, in one step that no fork escapes. Their deaths are reported."""
        placeholders.command(self.init, self.init, Command.KILL_ALL)

    def end_by(self, when: float) -> None:
        """Have nodeinit end itself, and with it every job, at a time: also where nobody is left to do it.

        Args:
            when: seconds of CLOCK_BOOTTIME here; 0: not at all. The last word counts.

        Raises:
            OSError: it was not told.
        """
        ms = int((when + self._boottime_ahead()) * 1000) if when else 0
        placeholders.command(self.init, self.init, Command.LEASE, uid=ms & 0xFFFFFFFF, more=ms >> 32)

    def _boottime_ahead(self) -> float:
        """Seconds that its clock, which is the jobs', is ahead of ours."""
        if not self.has_clocks:
            return 0.0
        for line in Path(f"/proc/{self.init}/timens_offsets").read_text().splitlines():
            name, seconds, ns = line.split()
            if name == "boottime":
                return int(seconds) + int(ns) / 1e9
        return 0.0

    def processes(self) -> list[int]:
        """Job pids of what runs here, nodeinit and placeholders left out."""
        world = placeholders.World(self.init)
        try:
            return [ids.pid for ids in world.every() if ids.pid != INIT and not ids.placeholder]
        finally:
            world.close()

    def group_of(self, pid: int) -> list[int]:
        """Job pids of the others in a job's process group, placeholders left out; empty when there is no such job."""
        world = placeholders.World(self.init)
        try:
            job = world.get(pid)
            if job is None:
                return []
            group = [ids for ids in world.every() if ids.pgid == job.pgid and ids.pid != pid]
            return [ids.pid for ids in group if not ids.placeholder]
        finally:
            world.close()

    def placeholders(self) -> list[int]:
        """Job pids of the placeholders."""
        world = placeholders.World(self.init)
        try:
            return [ids.pid for ids in world.every() if ids.placeholder]
        finally:
            world.close()

    def reserve(self, owners: Mapping[int, int]) -> None:
        """Keep pids of the block for processes that are elsewhere; see engine/reserve.py. Raises OSError."""
        reserve.reserve(self.init, owners)

    def reserved(self) -> list[int]:
        """The pids of the block that are kept so. Raises OSError."""
        return reserve.reserved(self.init)

    def drop_unneeded_placeholders(self, free: Container[int] = ()) -> list[int] | None:
        """Kill the placeholders that are no job's parent, group or session leader.

        Args:
            free: pids of the block that need not be kept for a process elsewhere any more.

        Returns:
            Their pids; None while a process is being born here: try again.
        """
        swept = reserve.sweep(self.init, free)
        if swept is None:
            return None
        # One that was killed before and is not dead yet is found again; its death is reported once.
        dropped = [pid for pid in swept if pid not in self._dropped]
        for pid in dropped:
            self._dropped.add(pid)
        return dropped

    def act_for(self, pid: int, code: int, status: int, heard: int = 0) -> None:
        """Have a placeholder end, stop or go on as the process that it stands for did, for its parent to see.

        Args:
            code, status: as waitid(2) gives them.
            heard: of a stop, how many SIGCONTs to the placeholder had been passed on before it. Where there have been
                more, it is over.

        Raises:
            ProcessLookupError: no placeholder has this pid.
        """
        hostpid = self._placeholder(pid)
        match code:
            case os.CLD_EXITED:
                placeholders.command(self.init, hostpid, Command.END, (status & 0xFF) << 8)
            case os.CLD_KILLED | os.CLD_DUMPED:
                placeholders.command(self.init, hostpid, Command.END, status & 0x7F)
            case os.CLD_STOPPED if not procfs.is_stopped(hostpid):  # its parent may have been faster
                placeholders.command(self.init, hostpid, Command.STOP, status & 0x7F, more=heard)
            case os.CLD_CONTINUED:
                self.signal(pid, signal.SIGCONT)

    def lead(self, pid: int, session: bool) -> None:
        """Have a placeholder become the leader of a group, or of a session, as the process that it stands for did.

        Raises:
            ProcessLookupError: no placeholder has this pid.
        """
        placeholders.command(self.init, self._placeholder(pid), Command.SETSID if session else Command.SETPGID)

    def _placeholder(self, pid: int) -> int:
        hostpid = self.hostpid(pid)
        if hostpid is None or pid not in self.placeholders():
            raise ProcessLookupError(3, f"{pid} is no placeholder on this node")
        return hostpid

    def drop_placeholder(self, pid: int) -> None:
        """End one placeholder because the process that it stands for ended: its children become nodeinit's, natively.

        One that is a job's child as well ends as that job shall see it: `act_for`.

        Raises:
            ProcessLookupError: no placeholder has this pid.
        """
        found = placeholders.stands_for_child(self.init, pid)
        if found is None:
            raise ProcessLookupError(3, f"{pid} is no placeholder on this node")
        if found:
            return
        handle = self.open_process(pid)
        try:
            placeholders.dismiss(self.init, handle)
        finally:
            os.close(handle)
        self._dropped.add(pid)

    def close(self) -> None:
        """Kill nodeinit and with it every job; returns when all are dead. Idempotent."""
        if self.init_pidfd < 0:
            return
        try:
            pidfd.send(self.init_pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        select.select([self.init_pidfd], [], [], _START_S)
        _reap(self.init)
        self._bearer.close()
        os.close(self.init_pidfd)
        os.close(self._namespace)
        self.init_pidfd = self._namespace = -1
        self.reports.close()


def _run_starter(theirs: socket.socket, block: range, root: str | None, clocks: Clocks | None, spawn: Spawn) -> None:
    # nodeinit makes the namespaces itself: between fork and exec of a threaded program no Python may run.
    arguments = [str(PROGRAM), "@0", str(block.start), str(block.stop)]
    # A placeholder that is run anew finds its socket by BPFS_CONTROL (engine/target.py).
    environment = {"BPFS_COOKIE": f"{secrets.randbits(32) | 1:x}", "BPFS_CONTROL": "@0"}
    if root is not None:
        environment["BPFS_ROOT"] = root
    if clocks is not None:
        environment["BPFS_CLOCKS"] = clocks.offsets()
    spawn(arguments, environment, [theirs.fileno()])


def _run(arguments: Sequence[str], environment: Mapping[str, str], fds: Sequence[int]) -> int:
    number = str(fds[0])
    subprocess.run(
        [number if word == "@0" else word for word in arguments],
        env={name: number if word == "@0" else word for name, word in environment.items()},
        pass_fds=fds, cwd="/", check=False, timeout=_START_S,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return 0


def _receive(reports: socket.socket, *wanted: Kind) -> Report:
    packet = reports.recv(REPORT.size)
    if not packet:
        raise ProcessLookupError(3, "nodeinit ended at its start")
    report = Report.parse(packet)
    if report.status:
        raise OSError(report.status, f"nodeinit: {os.strerror(report.status)}")
    if report.kind not in wanted:
        raise ProcessLookupError(3, f"nodeinit answered {report.kind.name} at its start")
    return report


def _end(init: int) -> None:
    try:
        os.kill(init, signal.SIGKILL)
    except ProcessLookupError:
        pass
    _reap(init)


def _reap(init: int) -> None:
    try:
        os.waitpid(init, 0)
    except ChildProcessError:
        pass  # somebody else's child, or reaped by the caller's own loop
