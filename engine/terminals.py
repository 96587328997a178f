"""The controlling terminal of a process that arrives on a node.

On the node a session's terminal is a pseudo-terminal that all of its jobs there share (bpfs/slave/relay.py). Only a
session leader can take one, and only those inherit it that are born in the session afterwards. So it is taken while
the process is placed:

* a process that leads its session takes the terminal itself, before anybody is born under it;
* else the placeholder of the session's leader takes it, right before the process is born under it.

The foreground group is the one of the real terminal where that has members here, else the leader's: who arrives from
the foreground takes it with him, and afterwards the leader's placeholder is told (`order_foreground`).

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
from engine.runner import Calls, Injection

_PTS: Final = re.compile(r"/dev/pts/(\d{1,7})")
_PTS_MAJOR: Final = 136  # UNIX98_PTY_SLAVE_MAJOR, <linux/major.h>
_TIOCSCTTY: Final = 0x540E  # <asm-generic/ioctls.h>
_TIOCSPGRP: Final = 0x5410
_TIOCNOTTY: Final = 0x5422
_OPEN_FLAGS: Final = os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK
_PATIENCE_S: Final = 5.0  # takes 0.1 ms; afterwards the process lives without

STOPPED: Final = -2
"""No group: see `foreground`."""


@dataclass(frozen=True, slots=True)
class _Stat:
    """What /proc/PID/stat says of a process and its terminal, in pids of the job namespace."""

    state: bytes
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
        # struct new_encode_dev of <linux/kdev_t.h>
        self._device = self._number & 0xFF | _PTS_MAJOR << 8 | (self._number & ~0xFF) << 12 if found else 0
        self._init, self._front = init, front
        self._pid, self._pgid, self._sid = ids
        self._inherited = False
        self._foreign = False

    @property
    def _leads(self) -> bool:
        return self._sid == self._pid

    def offer(self, world: World, birth: Birth, steps: list[Step]) -> None:
        """The session is there, and nobody of `steps` yet: have its leader take the terminal where that is right."""
        if self._number < 0 or self._leads or self._sid == INIT:
            return
        leader = world.get(self._sid)
        held = _stat(self._init, self._sid)
        if leader is None or held is None or leader.sid != self._sid:
            return
        makers = {step.pid: step.maker for step in steps if step.pid != step.maker}
        oldest = birth.maker
        while oldest in makers:
            oldest = makers[oldest]
        if held.terminal != self._device and leader.placeholder and oldest == self._sid and self._is_idle(world, held):
            self._take()
        ancestor = _stat(self._init, oldest)
        self._inherited = ancestor is not None and ancestor.terminal == self._device
        self._foreign = ancestor is not None and not self._inherited and ancestor.terminal != 0

    def _is_idle(self, world: World, held: _Stat) -> bool:
        """Whether nobody needs the terminal that the leader has."""
        return not held.terminal or not any(ids.sid == self._sid and not ids.placeholder for ids in world.every())

    def _take(self) -> None:
        leader = _outer(self._init, self._sid)
        if leader is None:
            return
        command(self._init, leader, Command.TERMINAL, self._number)
        deadline = time.monotonic() + _PATIENCE_S
        tries = 0
        while (stat := _stat(self._init, self._sid)) is not None and time.monotonic() < deadline:
            if stat.terminal == self._device:
                return
            tries += 1
            if tries > 20:
                time.sleep(0.0005)

    def add_rows(self, calls: Calls) -> None:
        """Add what the new process does itself: all its descriptors are closed, so what it opens is number 0."""
        if (self._leads and self._number >= 0) or (self._inherited and self._front):
            self._open(calls)
            self._add_use(calls, 0)
        elif self._foreign:
            self._open(calls)
            calls.add("ioctl", 0, _TIOCNOTTY, 0, must=False)
            calls.add("close", 0, must=False)

    def settle(self, injection: Injection) -> None:
        """The same in a process that has descriptors of its own: one that children are to be born of, or that stood for
        itself here."""
        if self._number < 0 or not (self._leads or self._front):
            return
        calls = Calls(injection)
        self._open(calls)
        (number,) = calls.run()
        if number >= 0:
            calls = Calls(injection)
            self._add_use(calls, number)
            calls.run()

    def _open(self, calls: Calls) -> int:
        path = f"/dev/pts/{self._number}" if self._leads else "/dev/tty"
        return calls.add("open", calls.data(os.fsencode(path) + b"\0"), _OPEN_FLAGS, 0, must=False)

    def _add_use(self, calls: Calls, number: int) -> None:
        if self._leads:
            calls.add("ioctl", number, _TIOCSCTTY, 0, must=False)
        if self._front:
            # All signals are blocked yet: else SIGTTOU would stop who does this from the background.
            calls.add("ioctl", number, _TIOCSPGRP, calls.data(struct.pack("<i", self._pgid)), must=False)
        calls.add("close", number, must=False)


def order_foreground(init: int, sid: int, group: int) -> int:
    """Have the placeholder of a session's leader put a process group into the foreground of the session's terminal.

    Args:
        group: job pid; 0: the leader's own.

    Returns:
        The group that `foreground` will tell soon; 0 where the leader is no placeholder: it does so itself.

    Raises:
        OSError: the namespace is gone.
    """
    world = World(init)
    try:
        leader = world.get(sid)
    finally:
        world.close()
    outer = _outer(init, sid)
    if leader is None or outer is None or not leader.placeholder or leader.sid != sid:
        return 0
    command(init, outer, Command.FOREGROUND, group or leader.pgid)
    return group or leader.pgid


def foreground(init: int, sid: int) -> int:
    """The foreground group of a session's terminal, as its leader sees it; 0: there is none; STOPPED: the leader stands
    still, for its parent to see, and obeys no order until it goes on."""
    stat = _stat(init, sid)
    if stat is not None and stat.state == b"T":
        return STOPPED
    return stat.foreground if stat is not None else 0


def _outer(init: int, pid: int) -> int | None:
    namespace = nsfs.open_pid_namespace(init)
    try:
        return outer_pid(init, namespace, pid)
    finally:
        os.close(namespace)


def _stat(init: int, pid: int) -> _Stat | None:
    try:
        with open(f"/proc/{init}/root/proc/{pid}/stat", "rb", buffering=0) as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return _Stat(fields[0], int(fields[4]), int(fields[5]))
