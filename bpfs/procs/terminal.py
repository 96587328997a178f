"""What a process of the master, or the ghost in its place, has to do with its controlling terminal."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection

from engine.linux.procfs import own_file, read

# Majors of terminals (Documentation/admin-guide/devices.txt): consoles, serial lines, ptys, /dev/tty.
_TTY_MAJORS = frozenset({3, 4, 5, 166, 188, 204, 207, 229, *range(136, 144)})

_OWN_TTY = os.makedev(5, 0)  # /dev/tty


def _stat(pid: int) -> list[str]:
    try:
        return read(own_file(pid, "stat")).decode(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def terminal_of(pid: int) -> int:
    """The device of a process's controlling terminal; 0: it has none."""
    fields = _stat(pid)
    return int(fields[4]) if len(fields) > 5 else 0


def on_terminal(pid: int) -> bool:
    """Whether a process has a controlling terminal and some terminal open: one that ended has none."""
    fields = _stat(pid)
    return len(fields) > 5 and fields[4] != "0" and _holds_terminal(pid)


def in_foreground(pid: int) -> bool:
    """Whether a process is in its terminal's foreground group."""
    return foreground_group(pid) != 0


def foreground_group(pid: int) -> int:
    """A process's group, where that is in the foreground of its terminal; else 0."""
    fields = _stat(pid)
    return int(fields[2]) if len(fields) > 5 and fields[5] == fields[2] else 0


def session_of(pid: int, fds: Collection[int]) -> int:
    """The session whose controlling terminal these descriptors of a process are; 0: they are another terminal."""
    fields = _stat(pid) if fds else []
    if len(fields) < 6 or fields[4] == "0":
        return 0
    # dev_t as new_encode_dev of <linux/kdev_t.h> has it
    number = int(fields[4])
    own = os.makedev(number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00)
    devices = {_terminal(f"/proc/{pid}/fd/{fd}") for fd in fds}
    return int(fields[3]) if devices and devices <= {own, _OWN_TTY} else 0


def _holds_terminal(pid: int) -> bool:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return any(_terminal(f"{folder}/{name}") for name in names)


def _terminal(path: str) -> int:
    """The device number of a terminal that a link in /proc/PID/fd leads to; 0: it leads to none."""
    try:
        # Never a stat of what may be a file of our own tree. In another mount namespace it may be but `/3`.
        name = os.readlink(path)
        if not name.startswith("/dev/") and not name[1:].isdigit():
            return 0
        found = os.stat(path)
    except OSError:
        return 0
    return found.st_rdev if stat.S_ISCHR(found.st_mode) and os.major(found.st_rdev) in _TTY_MAJORS else 0
