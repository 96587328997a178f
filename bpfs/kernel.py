"""The few system calls that the daemons need and Python 3.11 lacks: prctl(2), unshare(2), setns(2), mount(2),
umount2(2).

Three lines each: types once, call, raise OSError. No policy.
"""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS = 0x00020000  # include/uapi/linux/sched.h
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8  # include/uapi/linux/mount.h
MS_BIND, MS_REC, MS_PRIVATE, MS_SHARED = 4096, 16384, 1 << 18, 1 << 20

MNT_FORCE = 1  # sys/mount.h
MNT_DETACH = 2

PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36

_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def _check(result: int, subject: str) -> int:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), subject)
    return result


def set_parent_death_signal(signo: int) -> None:
    """Have this process get a signal when the *thread* that made it ends."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signo, 0, 0, 0), "PR_SET_PDEATHSIG")


def set_subreaper() -> None:
    """Have orphaned descendants of this process become its children."""
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "PR_SET_CHILD_SUBREAPER")


def set_comm(name: str) -> None:
    """Set the name that ps shows; the kernel keeps 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _check(_libc.prctl(PR_SET_NAME, ctypes.addressof(buffer), 0, 0, 0), name)


def unshare(flags: int) -> None:
    """Leave namespaces for new ones; with CLONE_NEWPID the next child is pid 1."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, flags: int) -> None:
    """Enter the namespace, or with a pidfd the namespaces, of a descriptor."""
    _check(_libc.setns(fd, flags), "setns")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount, or change a mount."""
    words = [os.fsencode(word) for word in (source, target, kind)]
    _check(_libc.mount(*words, flags, options.encode() or None), target)


def umount(target: str, flags: int = MNT_DETACH) -> None:
    """Unmount; by default at once, even when busy."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def set_title(title: str) -> None:
    """Set name and command line that ps shows; as much as fits where the program's arguments are
    (proc_pid_stat(5))."""
    set_comm(title.partition(":")[0])
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: fields 48 and 49
    except (OSError, ValueError, IndexError):
        return
    if 0 < start < end:
        # The last byte stays NUL: otherwise the kernel reads on into the environment.
        text = os.fsencode(title)[: end - start - 1]
        ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)
