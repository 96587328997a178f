"""The slave's supervisor: starts the slave's lives, one process each, and holds the fence.

A *life* is a forked process (bpfs.slave.life): it connects, holds jobs, and ends. When it ends, however, the
supervisor kills whatever it left (all descendants end up as the supervisor's children: pid 1 of a virtual node by
nature, elsewhere as subreaper) and only then starts the next life. So a slave that connects again has no job of an
earlier life, whatever happened to it.

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
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TypeAlias

from bpfs import kernel, log
from bpfs.config import ONLOST
from bpfs.errors import BpfsError
from bpfs.slave import machine
from bpfs.slave.options import SlaveOptions
from bpfs.wire.messages import Welcome
from engine.linux import procfs

_log = log.get("supervisor")

NOTE = struct.Struct("=dqBd")
"""From a life: its lease's end (seconds of CLOCK_BOOTTIME; 0: no jobs, no lease), its node number, and what is to be
done without a master (index of `ONLOST`) after how many seconds."""

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


class End(enum.IntEnum):
    """How a life ended, as its exit code; any other code, or a signal, is a crash."""

    FOR_GOOD = 0  # told to end: so does the supervisor
    AFRESH = 75  # fenced, or told to start afresh
    REBOOT = 76
    HALT = 77
    PWROFF = 78


class Reporter:
    """A life's way to tell its supervisor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def note(self, lease_end: float, welcome: Welcome) -> None:
        """Say until when this life may hold jobs, and what the master said."""
        onlost = ONLOST.index(welcome.onlost) if welcome.onlost in ONLOST else 0
        if welcome.onlost == "continue":
            lease_end = 0.0  # its jobs may outlive that
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._fd, NOTE.pack(lease_end, welcome.node, onlost, welcome.onlost_after))


Live: TypeAlias = Callable[[SlaveOptions, Reporter, bytes, "int | None"], int]


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
        self._wake, self._wake_send = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int:
        """Give the exit code."""
        kernel.set_subreaper()
        signal.set_wakeup_fd(self._wake_send, warn_on_full_buffer=False)
        for signo in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(signo, self._on_signal)
        pause = 0.0
        while not self._told_to_end:
            began = time.monotonic()
            code = self._one_life()
            if code in (End.FOR_GOOD, End.REBOOT, End.HALT, End.PWROFF) and self._finish(code):
                return 0
            crashed = code not in list(End)
            if crashed:
                _log.error("the slave ended unexpectedly (%s); starting it afresh", _describe(code))
            short = crashed and time.monotonic() - began < SHORT_LIFE
            pause = min(max(2 * pause, 0.2), PAUSE_MAX) if short else 0.0
            self._wait(pause * random.uniform(0.8, 1.2))
        return 0

    def _on_signal(self, signo: int, _frame: object) -> None:
        if signo != signal.SIGCHLD:
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
        receive, send = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        pid = os.fork()
        if not pid:
            os.close(receive)
            self._be_life(send)
        os.close(send)
        try:
            code = self._watch(pid, receive)
        finally:
            os.close(receive)
        if stuck := kill_descendants():
            _log.error("killed, and not gone yet (a server or disk out of reach?): %s", " ".join(map(str, stuck)))
        return code

    def _be_life(self, send: int) -> None:
        """In the child; never returns."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for signo in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(signo, signal.SIG_DFL)
            kernel.set_parent_death_signal(signal.SIGKILL)
            os.close(self._wake)
            os.close(self._wake_send)
            code = self._live(self._options, Reporter(send), self._identity, self._number)
        except BpfsError as error:
            _log.error("%s", error)
        except BaseException as error:
            _log.error("the slave failed", exc_info=error)
        finally:
            os._exit(code)

    def _watch(self, pid: int, notes: int) -> int:
        lease_end, asked, deadline = 0.0, False, 0.0
        poller = select.poll()
        poller.register(notes, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while True:
            timeout: float | None = None
            if self._told_to_end and not asked:
                asked, deadline = True, time.monotonic() + END_TIMEOUT
                os.kill(pid, signal.SIGTERM)
            if asked:
                timeout = deadline - time.monotonic()
            if lease_end:
                left = lease_end + GRACE - time.clock_gettime(time.CLOCK_BOOTTIME)
                timeout = left if timeout is None else min(timeout, left)
            if timeout is not None and timeout <= 0:
                _log.warning("the slave is killed: %s", "it did not end" if asked else "it outlived its lease")
                os.kill(pid, signal.SIGKILL)
                self._abort_mount()
                lease_end, asked, deadline = 0.0, True, time.monotonic() + END_TIMEOUT
                timeout = END_TIMEOUT
            for fd, _ in poller.poll(None if timeout is None else timeout * 1000 + 1):
                if fd == self._wake:
                    _drain(fd)
                    code = _reap(pid)
                    if code is not None:
                        return code
                else:
                    data = _drain(fd)
                    if not data:
                        poller.unregister(notes)  # the life has closed it, so it is ending
                    elif len(data) >= NOTE.size:
                        lease_end, number, onlost, after = NOTE.unpack(
                            data[len(data) // NOTE.size * NOTE.size - NOTE.size :][: NOTE.size]
                        )
                        self._options = replace(self._options, onlost=ONLOST[onlost], onlost_after=after)
                        self._number = number if number >= 0 else self._number

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


def _drain(fd: int) -> bytes:
    data = b""
    with suppress(BlockingIOError):
        while chunk := os.read(fd, 4096):
            data += chunk
    return data


def _reap(wanted: int) -> int | None:
    """Reap every dead child; the exit code of the wanted one where it was among them."""
    found = None
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid == wanted:
                found = os.waitstatus_to_exitcode(status)
    return found


def kill_descendants() -> list[int]:
    """Kill every descendant and wait until all are gone: orphans come to us, the reaper, and are next.

    One that the kernel cannot end now, because it waits for a disk or a server that is away, runs no more either: after
    `STUCK_TIMEOUT` (`EXIT_TIMEOUT` where it is known to be at its end) they are left to it, and their pids returned.
    """
    began = time.monotonic()
    while True:
        _reap(0)
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
