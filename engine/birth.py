"""A new process on the master that is to become the place of an image: the ghost program, under a chosen pid.

The worker forks once, so that the newborn's parent ends at once and it belongs to nobody, as a daemon does.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from engine.linux.libc import syscall
from engine.linux.x86_64 import NR

_CLONE3_SIZE: Final = 88  # struct clone_args up to cgroup (Linux 5.7)
_CONTROL_FLOOR: Final = 200
_ABOVE: Final = 512  # descriptors are gathered above this before they get their numbers
_REPORT: Final = struct.Struct("<ii")  # pid, errno


@dataclass(frozen=True, slots=True)
class Newborn:
    """Who it is to be.

    Attributes:
        pid: under which it is made; 0: any.
        fds: number -> descriptor of this process.
        control: descriptor of the ghost's control socket.
        program: descriptor of the ghost program.
    """

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...]
    fds: Mapping[int, int]
    control: int
    program: int
    arguments: tuple[bytes, ...]
    environment: tuple[bytes, ...]


def bear(who: Newborn) -> int:
    """Make it. Returns its pid, in this process's namespace.

    Raises:
        FileExistsError: the pid is in use.
        OSError: it cannot be made: EINVAL where the pid lies above the machine's kernel.pid_max.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        between = os.fork()
        if between == 0:
            _make(who, writer)
        os.close(writer)
        writer = -1
        told = b""
        while part := os.read(reader, 64):  # up to its end: the exec has closed the other side
            told += part
        os.waitpid(between, 0)
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    reports = list(_REPORT.iter_unpack(told))
    pid, code = max((pid for pid, _ in reports), default=0), max((code for _, code in reports), default=errno.EIO)
    if code == errno.EEXIST:
        raise FileExistsError(code, f"pid {who.pid} is in use")
    if code:
        raise OSError(code, f"no process {who.pid or ''} can be made: {os.strerror(code)}".replace("  ", " "))
    return pid


def _make(who: Newborn, report: int) -> None:
    try:
        pid = _clone(who.pid)
        if pid == 0:
            _become(who, report)
        os.write(report, _REPORT.pack(pid, 0))
    except OSError as error:
        os.write(report, _REPORT.pack(0, error.errno or 5))
    finally:
        os._exit(0)


def _clone(pid: int) -> int:
    # flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid set_tid_size cgroup
    wanted = ctypes.c_int(pid)
    where, count = (ctypes.addressof(wanted), 1) if pid else (0, 0)
    arguments = struct.pack("<11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, where, count, 0)
    return syscall(NR["clone3"], arguments, _CLONE3_SIZE)


def _become(who: Newborn, report: int) -> None:
    above = max([_ABOVE, *(number + 1 for number in who.fds)])
    try:
        os.setsid()
        gathered = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for number, fd in who.fds.items()}
        control, program, report = (
            fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in (who.control, who.program, report)
        )
        os.closerange(0, above)
        for number, fd in gathered.items():
            os.dup2(fd, number, inheritable=True)
        control = fcntl.fcntl(control, fcntl.F_DUPFD, _CONTROL_FLOOR)
        os.umask(0o077)
        os.setgroups(who.groups)
        os.setresgid(who.gid, who.gid, who.gid)
        os.setresuid(who.uid, who.uid, who.uid)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        environment = dict(word.split(b"=", 1) for word in who.environment)
        os.execve(program, who.arguments, {**environment, b"BPFS_CONTROL": b"%d" % control})
    except OSError as error:
        os.write(report, _REPORT.pack(0, error.errno or 5))
    finally:
        os._exit(1)
