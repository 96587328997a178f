# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel knows of an open descriptor, without asking the file system behind it: proc_pid_fdinfo(5).

A daemon that serves a tree must never fstat(2) a descriptor that may belong to that very tree (a job's standard output
can be /bpfs/nodes/7/migrate): fstat asks the file system, which is the daemon, which waits in fstat.
"""

from __future__ import annotations

from errno import EOPNOTSUPP
from pathlib import Path


def inode_and_offset(fd: int) -> tuple[int, int]:
    """The inode number and the file offset of one of our descriptors.

    Raises:
        OSError: EBADF or the like; EOPNOTSUPP where the kernel is older than 5.14 and tells no inode.
    """
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines() if ":" in line
    )
    if "ino" not in fields:
        raise OSError(EOPNOTSUPP, "the kernel tells no inode in fdinfo")
    return int(fields["ino"]), int(fields["pos"])
