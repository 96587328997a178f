"""Strict jobs: the filter under which they run, put on while a process is rebuilt and still has root's rights.

The kernel hands some of their system calls over to csrc/callwatch.c (seccomp_unotify(2)). A filter cannot be taken off,
and children inherit it: so whoever is rebuilt elsewhere has none, until it is given one there. Since it is root's, it
needs no "no new privileges": set-user-ID programs go on working.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Final

from engine.freeze import Frozen
from engine.linux import process_vm, procfs, ptrace, seccomp
from engine.linux.seccomp import Step, jump, load, ret
from engine.runner import TRAP_SIGNALS, Calls

if TYPE_CHECKING:
    from engine.target import Target

_CLONE_THREAD: Final = 0x10000

# <asm/unistd_64.h>
_TGKILL: Final = 234
_CLONE: Final = 56
_ALWAYS: Final = {
    "fork": 57, "vfork": 58, "kill": 62, "rt_sigqueueinfo": 129, "tkill": 200, "rt_tgsigqueueinfo": 297,
    "pidfd_send_signal": 424, "clone3": 435,
}  # fmt: skip
_ANSWER_S: Final = 5.0  # for the node's daemon to take a listener


def _program() -> bytes:
    """Hands over what `_ALWAYS` lists; clone of no thread; tgkill but by the signals that stop
    a process for the engine, which Go's runtime uses for its own threads as well."""
    steps: list[Step] = [
        load(seccomp.ARCH),
        jump(seccomp.EQUAL, seccomp.ARCH_X86_64, otherwise="allow"),
        load(seccomp.NUMBER),
        *(jump(seccomp.EQUAL, number, then="notify") for number in _ALWAYS.values()),
        jump(seccomp.EQUAL, _TGKILL, then="tgkill"),
        jump(seccomp.EQUAL, _CLONE, then="clone", otherwise="allow"),
        load(seccomp.argument(0), label="clone"),
        jump(seccomp.ANY_BIT, _CLONE_THREAD, then="allow", otherwise="notify"),
        load(seccomp.argument(2), label="tgkill"),
        *(jump(seccomp.EQUAL, number, then="allow") for number in (0, *TRAP_SIGNALS)),
        ret(seccomp.USER_NOTIF, label="notify"),
        ret(seccomp.ALLOW, label="allow"),
    ]
    return seccomp.assemble(steps)


PROGRAM: Final = _program()


def address(init: int) -> str:
    """Where the daemon takes listeners of jobs whose nodeinit is `init`: an abstract Unix socket."""
    return f"\0bpfs-strict-{os.stat(f'/proc/{init}/ns/pid').st_ino}"


def is_ours(frozen: Frozen) -> bool:
    """Whether a process is under the filter of strict jobs and no other; of one that runs, whether it can be."""
    if frozen.status.get("Seccomp_filters") != "1":
        return False
    if not frozen.threads[0].stopped:
        return True
    try:
        return ptrace.seccomp_filter(frozen.threads[0].tid) == PROGRAM
    except OSError:
        return False


def put_on(target: Target, init: int) -> None:
    """Have a process in the making, all its threads included, be under the filter, and its node's daemon know.

    One that has been under it before it left, and stood for itself meanwhile, still is.

    Args:
        init: host pid of nodeinit.

    Raises:
        OSError: the kernel cannot (before 5.13, or without user notification), or the daemon does not take it.
    """
    if procfs.parse_status(procfs.read(f"/proc/{target.pid}/status"))["Seccomp"] != "0":
        return
    listener = _install(target)
    try:
        _hand_over(listener, init)
    finally:
        os.close(listener)


def _install(target: Target) -> int:
    flags = seccomp.NEW_LISTENER | (seccomp.TSYNC | seccomp.TSYNC_ESRCH if target.threads else 0)
    try:
        number = _seccomp(target, flags | seccomp.WAIT_KILLABLE_RECV)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        number = _seccomp(target, flags)  # before 5.19: a handler may interrupt a call that is being answered
    try:
        return process_vm.pidfd_getfd(target.pidfd, number)
    finally:
        target.injection.call("close", number)


def _seccomp(target: Target, flags: int) -> int:
    calls = Calls(target.injection)
    head = struct.pack("<HxxxxxxQ", len(PROGRAM) // 8, calls.data(PROGRAM))  # struct sock_fprog
    calls.add(seccomp.NR_SECCOMP, seccomp.SET_MODE_FILTER, flags, calls.data(head), label="strict mode")
    return calls.run()[-1]


def _hand_over(listener: int, init: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
        daemon.settimeout(_ANSWER_S)
        with contextlib.suppress(ConnectionRefusedError):
            daemon.connect(address(init))
            daemon.sendmsg([b"l"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))])
            if daemon.recv(1):
                return
    raise OSError(errno.EOPNOTSUPP, "this node has nobody who answers the calls of strict jobs")
