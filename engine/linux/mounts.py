"""/proc/PID/mountinfo, proc_pid_mountinfo(5): which file system is on which device."""

import os
from typing import Final

OF_SERVERS: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "afs", "9p", "gfs2", "ocfs2"})
"""File systems that hold back what was written until it is asked for, and that others see, too."""


def types(raw: bytes) -> dict[int, str]:
    """Device number -> type of the file system, as mount(8) says it."""
    return dict(map(_type, raw.splitlines()))


def type_of(device: int) -> str:
    """The type of the file system with this device number; empty where this process has none such mounted."""
    with open("/proc/self/mountinfo", "rb") as file:
        return types(file.read()).get(device, "")


def _type(line: bytes) -> tuple[int, str]:
    # "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw", with more or fewer words before the dash.
    before, _, after = line.partition(b" - ")
    major, minor = before.split(b" ", 3)[2].split(b":")
    return os.makedev(int(major), int(minor)), after.split(b" ", 1)[0].decode(errors="replace")
