# SPDX-License-Identifier: GPL-2.0-or-later
"""What /proc/PID of a ghost is to say so that ps and top show the process that it stands for. See proc_pid_stat(5)."""

from __future__ import annotations

FILES = ("stat", "status", "statm")
"""All that ps, top, htop, pgrep and pstree take figures from; the rest a ghost has right by itself."""

_FIRST = 3  # number of the field behind the name

_OURS = (4, 5, 6, 7, 8, 22)
"""Fields that the ghost has right: parent, group, session, terminal and its foreground group, start. The node's
terminals and its clock are others."""

_ADDRESSES = {26: b"1", 27: b"1", **dict.fromkeys((28, 29, 30, 35, 45, 46, 47, 48, 49, 50, 51, 52), b"0")}
"""Fields with addresses and the exit code, and what the kernel has in their place for who may not trace the process."""


def guarded(stat: bytes) -> bytes:
    """Returns a line of stat as the kernel shows it to everybody.

    Raises:
        ValueError: it is no such line.
    """
    end = stat.rindex(b") ") + 2
    fields = stat[end:].split()
    for field, text in _ADDRESSES.items():
        if field - _FIRST < len(fields):
            fields[field - _FIRST] = text
    return stat[:end] + b" ".join(fields) + b"\n"


def merge_stat(node: bytes, ghost: bytes) -> bytes:
    """Returns a line of stat, for everybody, with the node's figures and what the ghost has right.

    Raises:
        ValueError, IndexError: one of them is no such line.
    """
    head, _, tail = ghost.rpartition(b") ")
    own, figures = tail.split(), node[node.rindex(b") ") + 2 :].split()
    for field in _OURS:
        figures[field - _FIRST] = own[field - _FIRST]
    return guarded(head + b") " + b" ".join(figures))


def merge_status(node: bytes, ghost_stat: bytes) -> bytes:
    """Returns the text of status with the parent that the ghost has, out of its stat.

    Raises:
        ValueError, IndexError: they are no such texts.
    """
    parent = ghost_stat[ghost_stat.rindex(b") ") + 2 :].split()[1]
    before, name, after = node.partition(b"\nPPid:\t")
    if not name:
        raise ValueError("there is no PPid")
    return before + name + parent + after[after.index(b"\n") :]
