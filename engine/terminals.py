"""The controlling terminal of a process that arrives on a node.

On the node a job's terminal is a pseudo-terminal of its own (bpfs/slave/relay.py). Only a session leader can take one,
and only those inherit it that are born in the session afterwards. So it is taken while the process is placed:

* a process that leads its session takes the terminal itself;
* else the placeholder of the session's leader takes it, right before the process is born under it.

A session has one controlling terminal, while several of its jobs may be on one node, each with a pseudo-terminal. The
first that comes gets it. It is taken from a job that is away in the background for one in the foreground, unless the
former is stopped (a shell that was suspended goes on later) or in the same process group. The others live without one.

Nobody is hurt when a terminal changes hands or ends: nodeinit.c gives the foreground to an empty group before
TIOCNOTTY, which would send SIGHUP to it; the end of a pseudo-terminal sends SIGHUP to the session's leader alone, a
placeholder, and placeholders report nothing that the kernel sends.
"""

from __future__ import annotations

import os
import re
import struct
import time
from dataclasses import dataclass
from typing import Final

from engine.linux import nsfs
from engine.placeholders import INIT, Birth, Command, Step, World, command, outer_pid
from engine.runner import Calls

_PTS: Final = re.compile(r"/dev/pts/(\d{1,7})")
_PTS_MAJOR: Final = 136  # UNIX98_PTY_SLAVE_MAJOR, <linux/major.h>
_TIOCSCTTY: Final = 0x540E  # <asm-generic/ioctls.h>
_TIOCSPGRP: Final = 0x5410
_TIOCNOTTY: Final = 0x5422
_OPEN_FLAGS: Final = os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK
_PATIENCE_S: Final = 5.0  # takes 0.1 ms; afterwards the process lives without


@dataclass(frozen=True, slots=True)
class _Stat:
    """What /proc/PID/stat says of a process and its terminal, in pids of the job namespace."""

    state: str
    terminal: int  # tty_nr: 0, or the device as the kernel encodes it
    foreground: int  # tpgid


class Terminal:
    """The terminal of one process that is being placed."""

    def __init__(self, init: int, ids: tuple[int, int, int], path: str, front: bool) -> None:
        """Takes note of what is there; nothing happens yet.

        Args:
            init: pid of nodeinit as the caller sees it.
            ids: pid, process group and session of the process.
            path: of the pseudo-terminal, `/dev/pts/N`; anything else: it has none.
            front: at home it is in its terminal's foreground.
        """
        found = _PTS.fullmatch(path)
        self._number = int(found[1]) if found else -1
        self._init, self._front = init, front
        self._pid, self._pgid, self._sid = ids
        self._controlling = False
        self._shared = False

    def offer(self, world: World, birth: Birth, steps: list[Step]) -> None:
        """The session is there, and nobody of `steps` yet: have its leader take the terminal where that is right."""
        if self._number < 0 or self._sid in (INIT, self._pid):
            return
        leader = world.get(self._sid)
        heirs = {self._sid} | {step.pid for step in steps if step.pid != step.maker}
        if leader is None or not leader.placeholder or leader.sid != self._sid or birth.maker not in heirs:
            return
        if self._is_free(world):
            self._controlling = self._take()

    def _is_free(self, world: World) -> bool:
        held = self._stat(self._sid)
        if held is None or not held.terminal:
            return held is not None
        if held.foreground == self._pgid:
            self._shared = True
            return False
        members = [ids.pid for ids in world.every() if ids.pgid == held.foreground and not ids.placeholder]
        states = {stat.state for stat in map(self._stat, members) if stat is not None}
        return not states or (self._front and "T" not in states)

    def _take(self) -> bool:
        namespace = nsfs.open_pid_namespace(self._init)
        try:
            leader = outer_pid(self._init, namespace, self._sid)
        finally:
            os.close(namespace)
        if leader is None:
            return False
        command(self._init, leader, Command.TERMINAL, self._number)
        # struct new_encode_dev of <linux/kdev_t.h>
        wanted = self._number & 0xFF | _PTS_MAJOR << 8 | (self._number & ~0xFF) << 12
        deadline = time.monotonic() + _PATIENCE_S
        tries = 0
        while (stat := self._stat(self._sid)) is not None and time.monotonic() < deadline:
            if stat.terminal == wanted:
                return True
            tries += 1
            if tries > 20:
                time.sleep(0.0005)
        return False

    def _stat(self, pid: int) -> _Stat | None:
        try:
            with open(f"/proc/{self._init}/root/proc/{pid}/stat", "rb", buffering=0) as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return None
        return _Stat(fields[0].decode(), int(fields[4]), int(fields[5]))

    def add_rows(self, calls: Calls) -> None:
        """Add what the new process does itself: all its descriptors are closed, so what it opens is number 0."""
        if self._sid == self._pid:
            if self._number < 0:
                return
            self._open(calls, f"/dev/pts/{self._number}")
            calls.add("ioctl", 0, _TIOCSCTTY, 0, must=False)
            self._foreground(calls, self._pid)
        elif self._controlling:
            self._open(calls, "/dev/tty")
            self._foreground(calls, self._pgid)
        elif not self._shared:
            # What it inherited is another job's: no key typed there is meant for it.
            self._open(calls, "/dev/tty")
            calls.add("ioctl", 0, _TIOCNOTTY, 0, must=False)
        calls.add("close", 0, must=False)

    @staticmethod
    def _open(calls: Calls, path: str) -> None:
        calls.add("open", calls.data(os.fsencode(path) + b"\0"), _OPEN_FLAGS, 0, must=False)

    @staticmethod
    def _foreground(calls: Calls, group: int) -> None:
        # All signals are blocked yet: else SIGTTOU would stop who does this from the background.
        calls.add("ioctl", 0, _TIOCSPGRP, calls.data(struct.pack("<i", group)), must=False)
