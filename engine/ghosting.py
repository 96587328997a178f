"""Turn a frozen process into its ghost: the ghost program runs in its place, with its pid and all of its
descriptors.
"""

import contextlib
import itertools
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable
from typing import Final

from engine.freeze import Frozen
from engine.image import Image
from engine.linux import process_vm, procfs, ptrace, scm
from engine.linux.libc import NR
from engine.placeholders import own_program
from engine.runner import ALL_SIGNALS, HEAL_STRINGS, Calls, ProcessGone, row
from engine.state import PR_SET_DUMPABLE
from engine.target import exec_block

_CONTROL_FLOOR: Final = 200
_PASSED: Final = 4  # socket pair, program, control socket
CAP_CHECKPOINT_RESTORE: Final = 40  # <linux/capability.h>
_F_DUPFD: Final = 0
_FD_CLOEXEC: Final = 1
_F_SETFD: Final = 2
_LARGE: Final = 16 << 20  # bytes of memory that take longer to give back than a look every 0.1 ms costs
_AF_UNIX: Final = 1
_SEQPACKET_CLOEXEC: Final = 5 | 0o2000000
_MSG_CMSG_CLOEXEC: Final = 0x40000000
_AT_EMPTY_PATH: Final = 0x1000


class Passed:
    """What a frozen process is given that is to become the ghost: the ghost's program and its control socket.

    From here on it cannot be looked into by its own user: nobody but it shall come to what it is given.

    Attributes:
        program, control: descriptors of the process.
        death_signal: its own, which the exec of a program with rights would clear.
    """

    def __init__(self, frozen: Frozen, image: Image, program: int, control: int) -> None:
        """Pass it all on. `take_back` undoes that; so does the abandoned process itself, should the worker die.

        Args:
            program: descriptor of the ghost program.
            control: the ghost's end of its control socket.

        Raises:
            OSError: the process is as it was, or has ended.
        """
        self._frozen = frozen
        self.death_signal = image.death_signal
        # All threads stand still, so that the numbers which the kernel is going to choose are known before it does.
        taken = {int(name) for name in os.listdir(f"/proc/{frozen.pid}/fd")}
        floor = min(_CONTROL_FLOOR, max(image.limits[resource.RLIMIT_NOFILE][0] - 8, 3))
        chosen = list(itertools.islice((n for n in itertools.count() if n not in taken), _PASSED))
        chosen.append(next(n for n in itertools.count(floor) if n not in taken and n not in chosen))
        self._undo: list[tuple[str, tuple[int, ...]]] = [("close", (number,)) for number in chosen]
        self._undo.append(("prctl", (PR_SET_DUMPABLE, image.dumpable & 1)))
        injection = frozen.open_injection()
        injection.set_heal([row(NR[name], *arguments, must=False) for name, arguments in self._undo])
        try:
            self.program, self.control = _pass(frozen, program, control, floor)
        except OSError:
            with contextlib.suppress(OSError):  # it has ended
                self.take_back()
            raise

    def take_back(self) -> None:
        """The process goes on here. Raises OSError where it has ended."""
        injection = self._frozen.open_injection()
        calls = Calls(injection)
        for name, arguments in self._undo:
            calls.add(name, *arguments, must=False)
        calls.run()
        injection.set_heal([])


def become_ghost(
    frozen: Frozen,
    cloexec: list[int],
    closed: list[int],
    passed: Passed,
    environment: list[bytes],
    gone: Callable[[], object],
) -> None:
    """Exec the ghost inside the process and let it run.

    Args:
        cloexec: descriptors of the process that are close-on-exec: the ghost keeps them open.
        closed: those that it does not keep.
        passed: what it needs of ours; it finds the number of its control socket in `BPFS_CONTROL`, its death signal
            in `BPFS_DEATHSIG`.
        environment: the rest of its environment.
        gone: called as soon as the old program is sure to run no more.

    Raises:
        OSError: it did not come to the exec; the process is still frozen.
    """
    _prepare(frozen, cloexec, closed)
    death = b"BPFS_DEATHSIG=%d" % passed.death_signal
    arguments = procfs.read(f"{frozen.live}/cmdline").split(b"\0")[:-1] or [b"ghost"]
    _exec(frozen, passed.program, [*environment, death, b"BPFS_CONTROL=%d" % passed.control], arguments, gone)


def become_placeholder(frozen: Frozen, image: Image, init: int) -> None:
    """Exec nodeinit's program inside a job, which is to stand for itself on the node that it leaves, and let it run.

    Args:
        init: nodeinit's pid as the caller sees it.

    Raises:
        OSError: it did not come to the exec; the process is still frozen.
    """
    program, reports, arguments, environment = own_program(init)
    try:
        passed = Passed(frozen, image, program, reports)
    finally:
        os.close(program)
        os.close(reports)
    try:
        _prepare(frozen, [], [])
        arguments[1] = b"%d" % passed.control
        environment.append(b"BPFS_CONTROL=%d" % passed.control)
        _exec(frozen, passed.program, environment, arguments, lambda: None, "placeholder")
    except OSError:
        with contextlib.suppress(OSError):  # it has ended
            passed.take_back()
        raise


def _pass(frozen: Frozen, program: int, control: int, floor: int) -> tuple[int, int]:
    injection = frozen.open_injection()
    calls = Calls(injection)
    pair = calls.data(bytes(8))
    calls.add("prctl", PR_SET_DUMPABLE, 0)
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
    calls = Calls(injection)
    duplicate = calls.add("fcntl", ours, _F_DUPFD, floor, label="control socket")
    for fd in (ours, inner, other):
        calls.add("close", fd)
    return exe, calls.run()[duplicate]


def _prepare(frozen: Frozen, cloexec: list[int], closed: list[int]) -> None:
    calls = Calls(frozen.open_injection())
    for fd in closed:
        calls.add("fcntl", fd, _F_SETFD, _FD_CLOEXEC)
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


def _exec(
    frozen: Frozen, exe: int, environment: list[bytes], arguments: list[bytes], gone: Callable[[], object],
    what: str = "ghost",
) -> None:  # fmt: skip
    injection = frozen.open_injection()
    base = injection.base + HEAL_STRINGS
    data, argv, envp = exec_block(base + 16, arguments, environment)
    process_vm.write(frozen.pid, base, struct.pack("<QQ", ALL_SIGNALS, 0) + data)
    ptrace.ptrace(ptrace.SETOPTIONS, injection.tid, 0, ptrace.O_TRACESYSGOOD | ptrace.O_TRACEEXEC)
    calls = Calls(injection)
    calls.add("rt_sigprocmask", signal.SIG_SETMASK, base, 0, 8)
    calls.add("execveat", exe, base + 8, argv, envp, _AT_EMPTY_PATH, label=f"running the {what}")
    injection.others = [thread.tid for thread in frozen.threads[1:]]
    if procfs.own_bytes(frozen.pid) >= _LARGE:
        injection.while_waiting = _on_change(f"/proc/{frozen.pid}/exe", gone)
    done: list[bool] = []
    try:
        calls.run_until_exec(lambda: done.append(True))
    except OSError:
        if not done:
            ptrace.ptrace(ptrace.SETOPTIONS, injection.tid, 0, ptrace.O_TRACESYSGOOD)
        raise
    finally:
        injection.while_waiting = None
    _let_go(frozen)


def _on_change(link: str, then: Callable[[], object]) -> Callable[[], object]:
    """What to call time and again: does something, once, when the process has its new memory. The kernel is long in
    its exec then, giving back the old one: 30 ms a GB.
    """
    before, changed = os.stat(link), False

    def look() -> None:
        nonlocal changed
        if not changed:
            changed = not os.path.samestat(os.stat(link), before)
            if changed:
                then()

    return look


def _let_go(frozen: Frozen) -> None:
    try:
        ptrace.detach(frozen.pid)
    except OSError as error:
        raise ProcessGone(frozen.pid) from error
    finally:
        frozen.close()


def grant_rights(program: str, rights: int = 0) -> None:
    """Give a ghost program the rights that it needs, as an ordinary user, to become its process again.

    CAP_CHECKPOINT_RESTORE, for `/proc/PID/exe` and the ids of threads, and whatever the process had of its own. As
    *permitted* file capabilities: the ghost makes the first effective by itself, and no exec fails for want of it.
    On a nosuid mount, in another user namespace and under "no new privileges" the kernel grants none of them.

    Args:
        rights: capabilities that the process has, a bit each.

    Raises:
        OSError: the file system has no capabilities, or the caller may not.
    """
    rights |= 1 << CAP_CHECKPOINT_RESTORE
    # struct vfs_cap_data, revision 2 (<linux/capability.h>): magic, then permitted and inheritable, twice 32 bits.
    data = struct.pack("<5I", 0x02000000, rights & 0xFFFFFFFF, 0, rights >> 32, 0)
    os.setxattr(program, "security.capability", data)
