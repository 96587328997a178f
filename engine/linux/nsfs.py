"""<linux/nsfs.h>, ioctl_ns(2): pids translated between namespaces (Linux 6.11), with /proc as the older way."""

import errno
import fcntl
import os
from typing import Final

from engine.linux.procfs import own_file

_PID_FROM_PIDNS: Final = 0x8004B706  # _IOR(0xb7, 6, int): the caller's number of a pid of the namespace
_PID_IN_PIDNS: Final = 0x8004B708  # _IOR(0xb7, 8, int): the namespace's number of a pid of the caller


def open_pid_namespace(pid: int) -> int:
    """A descriptor of the pid namespace that a process lives in. Raises OSError."""
    return os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)


def outer_pid(namespace: int, pid: int) -> int | None:
    """The caller's number of the process `pid` of the namespace; None when there is none.

    Raises:
        NotImplementedError: the kernel is older than 6.11.
    """
    return _translate(namespace, _PID_FROM_PIDNS, pid)


def inner_pid(namespace: int, pid: int) -> int | None:
    """The namespace's number of the caller's process `pid`; the inverse of `outer_pid`."""
    return _translate(namespace, _PID_IN_PIDNS, pid)


def _translate(namespace: int, request: int, pid: int) -> int | None:
    try:
        return fcntl.ioctl(namespace, request, pid) or None
    except OSError as error:
        if error.errno == errno.ESRCH:
            return None
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            raise NotImplementedError("this kernel cannot translate pids (needs 6.11)") from error
        raise


def pids_by_status(pid: int) -> list[int]:
    """A process's number in every pid namespace from the caller's to its own (NSpid). Empty when it is gone."""
    _, found, rest = _status(pid).partition(b"\nNSpid:\t")
    return [int(word) for word in rest.split(b"\n", 1)[0].split()] if found else []


def name_by_status(pid: int) -> bytes:
    """A process's name, which a zombie has, too. Empty when it is gone."""
    return _status(pid).split(b"\n", 1)[0].partition(b"\t")[2]


def _status(pid: int) -> bytes:
    try:
        with open(own_file(pid, "status"), "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""
