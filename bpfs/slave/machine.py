"""What may be done to the machine itself, and where: only a real node can be rebooted, halted, powered off, or have
its clock set.

Whether this is a real node is nobody's choice but the node image's init's. Four things must hold at once, and a
developer's or user's machine has none of the last three:

* the init has written this boot's id into `MARK`, owned by root, mode 0400;
* the root file system is the initramfs (ramfs or tmpfs): nothing is installed here;
* this is the machine's initial pid namespace: no container, no virtual node;
* pid 1 of the machine is our init: its name is `INIT_COMM`.
"""

from __future__ import annotations

import ctypes
import os
import stat
import time
from errno import EOPNOTSUPP
from pathlib import Path

from bpfs.errors import BpfsError

MARK = Path("/run/bpfs-node-image")
INIT_COMM = "bpfs-init"

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_INITIAL_PID_NS = "pid:[4026531836]"  # PROC_PID_INIT_INO, include/linux/proc_ns.h
_RAM_ROOTS = {0x858458F6, 0x01021994}  # RAMFS_MAGIC, TMPFS_MAGIC of include/uapi/linux/magic.h

SYNC_TIMEOUT = 5.0
"""Seconds for disks to take what is to be written, before the machine ends all the same: a file system of a server that
is out of reach would hold it up for ever."""

_COMMANDS = {"reboot": 0x01234567, "halt": 0xCDEF0123, "pwroff": 0x4321FEDC}  # linux/reboot.h


def is_real_node() -> bool:
    """Whether the node image's init says that this machine is a real node, and nothing speaks against it."""
    try:
        info = MARK.lstat()
        marked = (
            stat.S_ISREG(info.st_mode)
            and info.st_uid == 0
            and stat.S_IMODE(info.st_mode) == 0o400
            and MARK.read_text().strip() == _BOOT_ID.read_text().strip()
        )
        return (
            marked
            and os.readlink("/proc/self/ns/pid") == _INITIAL_PID_NS
            and Path("/proc/1/comm").read_text().strip() == INIT_COMM
            and _root_type() in _RAM_ROOTS
        )
    except OSError:
        return False


def _root_type() -> int:
    # struct statfs begins with f_type, a long; 120 bytes on x86_64.
    buffer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None, use_errno=True).statfs(b"/", buffer) != 0:
        return 0
    return int.from_bytes(buffer.raw[:8], "little")


def end(how: str) -> None:
    """Reboot, halt or power off the machine. Never returns where it works.

    Args:
        how: `reboot`, `halt` or `pwroff`.

    Raises:
        BpfsError: EOPNOTSUPP: this is no real node.
        OSError: the kernel refused.
    """
    _expect_real(how)
    _sync()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.reboot(ctypes.c_int(_COMMANDS[how] - (1 << 32) if _COMMANDS[how] >> 31 else _COMMANDS[how])) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), how)


def _sync() -> None:
    child = os.fork()
    if not child:
        os.sync()
        os._exit(0)
    deadline = time.monotonic() + SYNC_TIMEOUT
    while not os.waitpid(child, os.WNOHANG)[0] and time.monotonic() < deadline:
        time.sleep(0.01)


def set_clock(realtime_ns: int) -> None:
    """Set the machine's clock.

    Raises:
        BpfsError: EOPNOTSUPP: this is no real node.
        OSError: the kernel refused.
    """
    _expect_real("the setting of the clock")
    time.clock_settime_ns(time.CLOCK_REALTIME, realtime_ns)


def slew_clock(gain_ns: int) -> None:
    """Have the machine's clock gain (or lose) so much, by running at another rate for a while: adjtime(3).

    Raises:
        BpfsError: EOPNOTSUPP: this is no real node.
        OSError: the kernel refused.
    """
    _expect_real("the adjustment of the clock")
    seconds, rest = divmod(gain_ns // 1000, 1_000_000)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.adjtime((ctypes.c_long * 2)(seconds, rest), None) != 0:  # struct timeval
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), "adjtime")


def _expect_real(what: str) -> None:
    if not is_real_node():
        raise BpfsError(EOPNOTSUPP, f"{what}: this is no real node")
