"""The slave's supervisor: starts the slave's lives, one process each, and holds the fence.

A *life* is a forked process (bpfs.slave.life): it connects, holds jobs, and ends. When it ends, however, the
supervisor kills whatever it left (all descendants end up as the supervisor's children: pid 1 of a virtual node by
nature, elsewhere as subreaper) and only then starts the next life. So a slave that connects again has no job of an
earlier life, whatever happened to it.

But for one case: a life that was killed, with time left on its lease. Its jobs live on, with what they need
(keeper.py), and the next life takes them up. All else that it left has to end by itself, within `SETTLE`: engines undo
what they have begun. Where anything is not as it should be, the jobs are killed as ever.

The supervisor is also the last keeper of the lease: a life tells it until when it may go on, and one that is hung
or stopped beyond that is killed. It imports nothing that the life does not, and being its parent in memory, starts
it in milliseconds.
"""

from __future__ import annotations

import enum
import os
import random
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from bpfs import kernel, log
from bpfs.errors import BpfsError
from bpfs.slave import anew, keeper, machine
from bpfs.slave.anew import Heritage
from bpfs.slave.keeper import Keeper, Order, Store
from bpfs.slave.options import SlaveOptions
from engine.linux import procfs

_log = log.get("supervisor")

GRACE = 0.2
"""Seconds after the lease's end in which a life should have ended by itself; less than any margin of the master's."""

END_TIMEOUT = 5.0
"""Seconds for a life to end in peace when we are told to end."""

STUCK_TIMEOUT = 5.0
"""Seconds for what was killed to be gone. Network file systems of jobs are the reason: their last user says goodbye to
the server, and a server out of reach is asked for minutes."""

EXIT_TIMEOUT = 1.0
"""Seconds of that for what the kernel is ending already: it runs no more, and only its files and mounts say goodbye."""

SHORT_LIFE = 5.0
"""A life shorter than this, ended by a fault of its own, is followed by a pause that doubles each time."""
PAUSE_MAX = 10.0

SETTLE = 5.0
"""Seconds for the engines of a life that was killed to undo what they have begun; it takes them some milliseconds."""

RETURNS = 3
"""Lives that may be killed, one after another, before one of them has taken up the jobs."""


class End(enum.IntEnum):
    """How a life ended, as its exit code; any other code, or a signal, is a crash."""

    FOR_GOOD = 0  # told to end: so does the supervisor
    AFRESH = 75  # fenced, or told to start afresh
    REBOOT = 76
    HALT = 77
    PWROFF = 78
    RETURN = 79  # no exit code: it was killed, and the next one takes up its jobs


READY = "ready"
"""The name under which a life keeps who its master is, as soon as the next one could go on with all that is kept."""

_ENGINES = ("bpfs-zygote", "bpfs-worker")

Live: TypeAlias = Callable[[SlaveOptions, Keeper, bytes, "int | None"], int]


class Supervisor:
    """Runs lives until told to end."""

    def __init__(self, options: SlaveOptions, live: Live) -> None:
        """Args:
        live: one life, in its own process; see bpfs.slave.life.
        """
        self._options = options
        self._live = live
        self._number = options.number
        self._identity = os.urandom(16)
        self._told_to_end = False
        self._store = Store()
        self._fence = self._lease_end = 0.0  # seconds of CLOCK_BOOTTIME
        self._lives = self._returns = 0
        self._killed = False  # by us
        self._asked_anew = self._anew = False  # told to start anew; the program is known to start
        self._check = 0  # pid of who tries that
        self._wake, self._wake_send = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    @classmethod
    def inherit(cls, heritage: Heritage, live: Live) -> Supervisor:
        """The same one, which was another program until now."""
        supervisor = cls(heritage.options, live)
        supervisor._identity, supervisor._number = heritage.identity, heritage.number
        supervisor._fence, supervisor._lease_end = heritage.fence, heritage.lease_end
        supervisor._lives, supervisor._store.kept = heritage.lives, heritage.kept
        return supervisor

    def run(self) -> int:
        """Give the exit code."""
        kernel.set_subreaper()
        signal.set_wakeup_fd(self._wake_send, warn_on_full_buffer=False)
        for signo in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signo, self._on_signal)
        pause = 0.0
        while not self._told_to_end:
            began = time.monotonic()
            code = self._one_life()
            if code in (End.FOR_GOOD, End.REBOOT, End.HALT, End.PWROFF) and self._finish(code):
                return 0
            if self._anew:
                self._go_on_anew()
            if code == End.RETURN:
                continue
            crashed = code not in list(End)
            if crashed:
                _log.error("the slave ended unexpectedly (%s); starting it afresh", _describe(code))
            short = crashed and time.monotonic() - began < SHORT_LIFE
            pause = min(max(2 * pause, 0.2), PAUSE_MAX) if short else 0.0
            self._wait(pause * random.uniform(0.8, 1.2))
        return 0

    def _on_signal(self, signo: int, _frame: object) -> None:
        if signo == signal.SIGHUP:
            self._asked_anew = True
        elif signo != signal.SIGCHLD:
            self._told_to_end = True

    def _finish(self, code: int) -> bool:
        """Do what the life was told to; True where the supervisor ends with it."""
        if code == End.FOR_GOOD:
            return True
        how = End(code).name.lower()
        if machine.is_real_node():
            try:
                machine.end(how)
            except OSError as error:
                _log.error("cannot %s: %s", how, error)
            return False
        # Elsewhere a reboot is a new life, and the end of the machine is the end of this daemon.
        return code != End.REBOOT

    # -- one life ----------------------------------------------------------------------------------

    def _one_life(self) -> int:
        """Start a life, watch it, and clear up after it; gives its exit code (minus the signal that killed it)."""
        ours, theirs = keeper.pair()
        self._killed = False
        pid = os.fork()
        if not pid:
            ours.close()
            self._be_life(theirs)
        theirs.close()
        with ours:
            code = self._watch(pid, ours)
        self._lives += 1
        if self._may_return(code):
            self._returns += 1
            _log.warning("the slave was ended (%s); the next one takes up its jobs", _describe(code))
            return End.RETURN
        self._store.clear()
        self._fence = self._lease_end = 0.0
        self._returns = 0
        if stuck := kill_descendants():
            _log.error("killed, and not gone yet (a server or disk out of reach?): %s", " ".join(map(str, stuck)))
        return code

    def _be_life(self, sock: socket.socket) -> None:
        """In the child; never returns."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for signo in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(signo, signal.SIG_DFL)
            kernel.set_parent_death_signal(signal.SIGKILL)
            os.close(self._wake)
            os.close(self._wake_send)
            own = Keeper(sock, self._store.kept, self._lease_end, self._lives)
            code = self._live(self._options, own, self._identity, self._number)
        except BpfsError as error:
            _log.error("%s", error)
        except BaseException as error:
            _log.error("the slave failed", exc_info=error)
        finally:
            os._exit(code)

    def _watch(self, pid: int, orders: socket.socket) -> int:
        asked, deadline = False, 0.0
        poller = select.poll()
        poller.register(orders, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while True:
            timeout: float | None = None
            if self._told_to_end and not asked:
                asked, deadline = True, time.monotonic() + END_TIMEOUT
                os.kill(pid, signal.SIGTERM)
            if asked:
                timeout = deadline - time.monotonic()
            if self._fence:
                left = self._fence + GRACE - time.clock_gettime(time.CLOCK_BOOTTIME)
                timeout = left if timeout is None else min(timeout, left)
            if timeout is not None and timeout <= 0:
                _log.warning("the slave is killed: %s", "it did not end" if asked else "it outlived its lease")
                _kill_others(pid)
                os.kill(pid, signal.SIGKILL)
                self._abort_mount()
                self._killed = True
                self._fence, asked, deadline = 0.0, True, time.monotonic() + END_TIMEOUT
                timeout = END_TIMEOUT
            for fd, _ in poller.poll(None if timeout is None else timeout * 1000 + 1):
                if fd == self._wake:
                    _drain(fd)
                    ended = _reap()
                    if pid in ended:
                        self._obey(orders)
                        return ended[pid]
                    self._start_anew(pid, ended)
                elif not self._obey(orders):
                    poller.unregister(orders)  # the life has closed it, so it is ending

    def _obey(self, sock: socket.socket) -> bool:
        """Do what a life has ordered; False once it has closed its end."""
        while True:
            try:
                packet = keeper.receive(sock)
            except BlockingIOError:
                return True
            if packet is None:
                return False
            (order, *words), fds = packet
            self._do(sock, order, words, fds)

    def _do(self, sock: socket.socket, order: int, words: list[Any], fds: list[int]) -> None:
        match order:
            case Order.LEASE:
                fence, self._lease_end, number, onlost, after = words
                self._fence = 0.0 if self._killed else fence
                self._options = replace(self._options, onlost=onlost, onlost_after=after)
                self._number = number if number >= 0 else self._number
            case Order.KEEP:
                key, value = words
                self._store.keep(key, value, fds)
                if key[0] == READY:
                    self._returns = 0
            case Order.DROP:
                self._store.drop(words[0])
            case Order.CLEAR:
                self._store.clear()
            case Order.SPAWN:
                arguments, environment = words
                keeper.spawn(sock, arguments, environment, fds)

    # -- another program -----------------------------------------------------------------------------

    def _start_anew(self, pid: int, ended: dict[int, int]) -> None:
        """Kill a life once it is sure that the next one can be of another program, where that was asked for."""
        if self._check in ended:
            self._anew, self._check = ended[self._check] == 0, 0
            if self._anew:
                os.kill(pid, signal.SIGKILL)
            else:
                _log.error("it does not start anew: the program fails")
        if self._asked_anew and not self._check:
            self._asked_anew = False
            try:
                self._check = anew.check()
            except OSError as error:
                _log.error("it does not start anew: %s", error)

    def _go_on_anew(self) -> None:
        self._anew = False
        number, store = self._number, self._store
        heritage = Heritage(
            self._options, self._identity, number, self._fence, self._lease_end, self._lives, store.kept
        )  # fmt: skip
        try:
            anew.go_on(heritage)
        except OSError as error:
            _log.error("it goes on as it was: %s", error)

    # -- a life that was killed ----------------------------------------------------------------------

    def _may_return(self, code: int) -> bool:
        """Whether the next life may take up the jobs of this one, which has ended in this way."""
        told = code in list(End) or self._told_to_end or self._killed
        if told or READY not in self._store or self._returns >= RETURNS:
            return False
        if not self._settle():
            return False
        _reap()
        return self._store.processes() <= set(procfs.children(os.getpid()))

    def _settle(self) -> bool:
        """Wait until all that the life had for itself has ended; False where it does not by itself, in time."""
        began, kept = time.monotonic(), self._store.processes()
        while left := [pid for pid in procfs.children(os.getpid()) if pid not in kept]:
            over = time.clock_gettime(time.CLOCK_BOOTTIME) >= self._lease_end
            if over or time.monotonic() - began > SETTLE:
                return False
            for pid in left:
                if not _comm(pid).startswith(_ENGINES):  # helpers, which may be killed at any time
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
            _reap()
        return time.clock_gettime(time.CLOCK_BOOTTIME) < self._lease_end

    def _abort_mount(self) -> None:
        # A thread of the life that waits for its own tree cannot die before that is aborted.
        if self._options.mount is not None:
            with suppress(OSError):
                kernel.umount(self._options.mount, kernel.MNT_FORCE)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._told_to_end and (left := deadline - time.monotonic()) > 0:
            if select.select([self._wake], [], [], left)[0]:
                _drain(self._wake)


def _comm(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _drain(fd: int) -> bytes:
    data = b""
    with suppress(BlockingIOError):
        while chunk := os.read(fd, 4096):
            data += chunk
    return data


def _reap() -> dict[int, int]:
    """Reap every dead child; gives their exit codes."""
    ended: dict[int, int] = {}
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def _kill_others(slave: int) -> None:
    """Kill all but the slave and wait, for `EXIT_TIMEOUT`: its own end tells the master that no job lives any more."""
    others = [pid for pid in procfs.children(os.getpid()) if pid != slave]
    for pid in others:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + EXIT_TIMEOUT
    while time.monotonic() < deadline and not all(procfs.has_ended(f"/proc/{pid}") for pid in others):
        time.sleep(0.002)


def kill_descendants() -> list[int]:
    """Kill every descendant and wait until all are gone: orphans come to us, the reaper, and are next.

    One that the kernel cannot end now, because it waits for a disk or a server that is away, runs no more either: after
    `STUCK_TIMEOUT` (`EXIT_TIMEOUT` where it is known to be at its end) they are left to it, and their pids returned.
    """
    began = time.monotonic()
    while True:
        _reap()
        left = procfs.children(os.getpid())
        waited = time.monotonic() - began
        if not left or waited > STUCK_TIMEOUT or (waited > EXIT_TIMEOUT and all(map(procfs.is_exiting, left))):
            return left
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
