"""What a process of the master, or the ghost in its place, has to do with its controlling terminal."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from engine.linux.procfs import own_file

# Majors of terminals (Documentation/admin-guide/devices.txt): consoles, serial lines, ptys, /dev/tty.
_TTY_MAJORS = frozenset({3, 4, 5, 166, 188, 204, 207, 229, *range(136, 144)})


def _stat(pid: int) -> list[str]:
    try:
        return Path(own_file(pid, "stat")).read_text(errors="replace").rpartition(")")[2].split()
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
    fields = _stat(pid)
    return len(fields) > 5 and fields[5] == fields[2]


def _holds_terminal(pid: int) -> bool:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return any(_is_terminal(f"{folder}/{name}") for name in names)


def _is_terminal(path: str) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    return stat.S_ISCHR(found.st_mode) and os.major(found.st_rdev) in _TTY_MAJORS
