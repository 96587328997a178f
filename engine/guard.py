"""What must not happen when a worker dies that fills the memory of a process that runs: that the process goes on.

The kernel would give it zeros in place of what has not come. So the zygote has a duplicate of each userfaultfd, which
keeps it waiting, until it has been killed: by the worker itself, or, where that was killed, by the zygote.
"""

import contextlib
import os
import select
import signal
import socket
import time

from engine.linux import pidfd, process_vm, procfs

HOLD = b"h"
RELEASE = b"r"
_PATIENCE_S = 5.0  # for the end of what was killed
_link: socket.socket | None = None


def use(link: socket.socket) -> None:
    """This is the way to the zygote."""
    global _link
    _link = link


def hold(fd: int) -> None:
    """Have the zygote keep a duplicate. Raises OSError: it is gone."""
    if _link is not None:
        socket.send_fds(_link, [HOLD], [fd], socket.MSG_NOSIGNAL)


def release() -> None:
    """The zygote may close them."""
    if _link is not None:
        with contextlib.suppress(OSError):  # it has ended, and so has what it held
            _link.send(RELEASE, socket.MSG_NOSIGNAL)


def end(pid: int, starttime: int, space: int) -> None:
    """Kill a process, and those that it has made since and that run in memory of which not all has come.

    Returns when they are dead, or will run no more.

    Args:
        starttime: of the process.
        space: of its pid namespace, the inode: who has lost his parent is known by it.
    """
    killed = [_kill(one) for one in _victims(pid, starttime, space)]
    deadline = time.monotonic() + _PATIENCE_S
    for process in killed:
        if process >= 0:
            poll = select.poll()
            poll.register(process, select.POLLIN)
            poll.poll(max(deadline - time.monotonic(), 0) * 1000)
            os.close(process)


def space_of(pid: int) -> int:
    """The inode of a process's pid namespace. Raises OSError."""
    return os.stat(f"/proc/{pid}/ns/pid").st_ino


def _victims(pid: int, starttime: int, space: int) -> list[int]:
    stats: dict[int, procfs.Stat] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                stats[int(name)] = procfs.parse_stat(procfs.read(procfs.own_file(name, "stat")))
    itself = [pid] if pid in stats and stats[pid].starttime == starttime else []
    family = set(itself)
    # An orphan is a child of whoever is the oldest in its namespace, or of a subreaper: of somebody older than it.
    while more := {one for one, stat in stats.items() if stat.ppid in family and one not in family}:
        family |= more
    for one, stat in stats.items():
        if one not in family and stat.starttime >= starttime and stat.ppid not in family and _is_orphan(stat, stats):
            with contextlib.suppress(OSError):
                if space_of(one) == space:
                    family.add(one)
    return itself + [one for one in family if one != pid and _waits_for_memory(one)]


def _is_orphan(stat: procfs.Stat, stats: dict[int, procfs.Stat]) -> bool:
    parent = stats.get(stat.ppid)
    return parent is None or parent.comm == b"nodeinit" or stat.ppid == 1


def _waits_for_memory(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return any("um" in vma.flags for vma in procfs.parse_smaps(procfs.read(f"/proc/{pid}/smaps")))
    return False


def _kill(pid: int) -> int:
    """Its pidfd; -1 where it is gone."""
    try:
        process = process_vm.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    with contextlib.suppress(ProcessLookupError):
        pidfd.send(process, signal.SIGKILL)
    return process
