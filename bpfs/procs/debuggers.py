# SPDX-License-Identifier: GPL-2.0-or-later
"""Who attaches gdb, strace or the like to a ghost is told, on his terminal, where the process is and what to type."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from bpfs import log
from bpfs.procs.process import Process
from bpfs.procs.terminal import terminal_of
from engine.linux.procfs import own_file, parse_status, read

_OURS = "bpfs-"  # engine workers trace ghosts, too
_TOOLS = frozenset({"strace", "ltrace"})  # called as gdb is: NAME -p PID
_PTS_MAJORS = range(136, 144)  # Documentation/admin-guide/devices.txt: 256 pseudo-terminals each

_log = log.get("procs")


class Debuggers:
    """Those who trace ghosts now, each told once."""

    def __init__(self) -> None:
        self._told: dict[int, int] = {}  # process -> tracer

    def look(self, proc: Process) -> None:
        """Something has stopped a ghost for a moment, or holds it: tells who traces it, if somebody does."""
        tracer = _tracer(proc.pid)
        if tracer == self._told.get(proc.pid, 0):
            return
        self._told.pop(proc.pid, None)
        try:
            name = Path(f"/proc/{tracer}/comm").read_text(errors="replace").strip() if tracer else _OURS
        except OSError:
            return  # gone already
        if name.startswith(_OURS):
            return
        self._told[proc.pid] = tracer
        command = f"bpsh {proc.place} {name if name in _TOOLS else 'gdb'} -p {proc.pid}"
        _log.info("process %d: %s (%d) traces its ghost; meant is: %s", proc.pid, name, tracer, command)
        _show(tracer, f"process {proc.pid} runs on node {proc.place}, this is only its ghost here. Use: {command}")

    def forget(self, proc: Process) -> None:
        """The ghost has gone."""
        self._told.pop(proc.pid, None)


def _tracer(pid: int) -> int:
    try:
        return int(parse_status(read(own_file(pid, "status")))["TracerPid"])
    except (OSError, KeyError, ValueError):
        return 0


def _show(pid: int, sentence: str) -> None:
    """Writes to the terminal of a process as wall(1) does; nothing of the process's own is opened."""
    device = terminal_of(pid)
    major, minor = os.major(device), os.minor(device)
    pts = major in _PTS_MAJORS
    path = f"/dev/pts/{(major - _PTS_MAJORS[0]) * 256 + minor}" if pts else f"/dev/char/{major}:{minor}"
    with suppress(OSError):  # it has none, or ended just now: the log says it
        if not device or not os.path.samestat(os.stat(f"/proc/{pid}/ns/mnt"), os.stat("/proc/self/ns/mnt")):
            return  # what has that name here is another's
        fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if stat.S_ISCHR(found.st_mode) and found.st_rdev == device:
                os.write(fd, f"\r\nbpfs: {sentence}\r\n".encode())
        finally:
            os.close(fd)
