"""Turn a frozen process into its ghost: the ghost program runs in its place, with its pid and all of its
descriptors.
"""

import os
import resource
import signal
import socket
import struct
from typing import Final

from engine.freeze import Frozen
from engine.linux import process_vm, procfs, ptrace, scm
from engine.runner import ALL_SIGNALS, HEAL_STRINGS, Calls, ProcessGone
from engine.target import exec_block

_CONTROL_FLOOR: Final = 200
_F_DUPFD: Final = 0
_F_SETFD: Final = 2
_AF_UNIX: Final = 1
_SEQPACKET_CLOEXEC: Final = 5 | 0o2000000
_MSG_CMSG_CLOEXEC: Final = 0x40000000
_AT_EMPTY_PATH: Final = 0x1000


def become_ghost(frozen: Frozen, cloexec: list[int], program: int, control: int, environment: list[bytes]) -> None:
    """Exec the ghost inside the process and let it run.

    Args:
        cloexec: descriptors of the process that are close-on-exec: the ghost keeps them open.
        program: descriptor of the ghost program.
        control: the ghost's end of its control socket; it finds its number in `BPFS_CONTROL`.
        environment: the rest of its environment.

    Raises:
        OSError: it did not come to the exec; the process is as it was and still frozen.
    """
    exe, number = _pass(frozen, program, control)
    _prepare(frozen, cloexec)
    _exec(frozen, exe, [*environment, b"BPFS_CONTROL=%d" % number])


def _pass(frozen: Frozen, program: int, control: int) -> tuple[int, int]:
    injection = frozen.open_injection()
    calls = Calls(injection)
    pair = calls.data(bytes(8))
    calls.add("socketpair", _AF_UNIX, _SEQPACKET_CLOEXEC, 0, pair, label="socket pair")
    calls.run()
    inner, other = struct.unpack("<ii", calls.read(pair, 8))
    pidfd = process_vm.pidfd_open(frozen.pid)
    try:
        with socket.socket(fileno=process_vm.pidfd_getfd(pidfd, other)) as sock:
            scm.send_fds(sock, [program, control])
            calls = Calls(injection)
            block = calls.reserve_block()
            calls.add("recvmsg", inner, block, _MSG_CMSG_CLOEXEC, label="receiving descriptors")
            calls.run()
            exe, ours = scm.received_fds(calls.read(block + scm.CONTROL_OFFSET, 1024))
    finally:
        os.close(pidfd)
    floor = min(_CONTROL_FLOOR, max(procfs.read_limits(frozen.pid)[resource.RLIMIT_NOFILE][0] - 8, 3))
    calls = Calls(injection)
    duplicate = calls.add("fcntl", ours, _F_DUPFD, floor, label="control socket")
    for fd in (ours, inner, other):
        calls.add("close", fd)
    return exe, calls.run()[duplicate]


def _prepare(frozen: Frozen, cloexec: list[int]) -> None:
    calls = Calls(frozen.open_injection())
    for fd in cloexec:
        calls.add("fcntl", fd, _F_SETFD, 0, must=False)
    for which in range(3):
        calls.add("setitimer", which, calls.data(bytes(32)), 0)
    # What the image carries must not reach the ghost as well, which would forward it. Later arrivals stay.
    zero = calls.data(bytes(16))
    for info in ptrace.queued_signals(frozen.threads[0].tid, shared=False) + ptrace.queued_signals(
        frozen.threads[0].tid, shared=True
    ):
        calls.add("rt_sigtimedwait", calls.data(struct.pack("<Q", 1 << (info[0] - 1))), 0, zero, 8, must=False)
    calls.run()


def _exec(frozen: Frozen, exe: int, environment: list[bytes]) -> None:
    injection = frozen.open_injection()
    arguments = procfs.read(f"{frozen.live}/cmdline").split(b"\0")[:-1] or [b"ghost"]
    base = injection.base + HEAL_STRINGS
    data, argv, envp = exec_block(base + 16, arguments, environment)
    process_vm.write(frozen.pid, base, struct.pack("<QQ", ALL_SIGNALS, 0) + data)
    ptrace.ptrace(ptrace.SETOPTIONS, injection.tid, 0, ptrace.O_TRACESYSGOOD | ptrace.O_TRACEEXEC)
    calls = Calls(injection)
    calls.add("rt_sigprocmask", signal.SIG_SETMASK, base, 0, 8)
    calls.add("execveat", exe, base + 8, argv, envp, _AT_EMPTY_PATH, label="running the ghost")
    injection.others = [thread.tid for thread in frozen.threads[1:]]
    done: list[bool] = []
    try:
        calls.run_until_exec(lambda: done.append(True))
    except OSError:
        if not done:
            ptrace.ptrace(ptrace.SETOPTIONS, injection.tid, 0, ptrace.O_TRACESYSGOOD)
        raise
    _let_go(frozen)


def _let_go(frozen: Frozen) -> None:
    try:
        ptrace.detach(frozen.pid)
    except OSError as error:
        raise ProcessGone(frozen.pid) from error
    finally:
        frozen.close()


def grant_exe_right(program: str) -> None:
    """Give a ghost program the one right that it needs to get `/proc/PID/exe` back at home when it runs as an
    ordinary user.

    CAP_CHECKPOINT_RESTORE as a file capability; it goes again with the home-coming. Without it (or on a nosuid mount)
    everything
    else works, but exe shows the ghost.

    Raises:
        OSError: the file system has no capabilities, or the caller may not.
    """
    # struct vfs_cap_data, revision 2 with the effective bit (<linux/capability.h>); capability 40 is bit 8 of the
    # second word.
    os.setxattr(program, "security.capability", struct.pack("<5I", 0x02000001, 0, 0, 1 << 8, 0))
