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
from collections.abc import Callable, Sequence
from typing import Final

from engine import switches
from engine.freeze import Frozen
from engine.image import Image
from engine.linux import process_vm, procfs, ptrace, scm
from engine.linux.x86_64 import NR
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
LARGE: Final = 16 << 20  # bytes of memory that take longer to give back than a look every 0.1 ms costs
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


class Exec:
    """An exec inside a frozen process that has been made ready: what it takes lies in its scratch, nothing of the
    process has changed yet.

    Args:
        what: the program in words.
        image: what the process is elsewhere.
        program: descriptor of the process.
        cloexec: its descriptors that are close-on-exec: the new program keeps them open.
        closed: those that it does not keep.
    """

    def __init__(
        self, what: str, frozen: Frozen, image: Image, program: int, arguments: list[bytes], environment: list[bytes],
        cloexec: Sequence[int] = (), closed: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._frozen, self._image, self._cloexec, self._closed = frozen, image, cloexec, closed
        injection = frozen.open_injection()
        base = injection.base + HEAL_STRINGS
        data, argv, envp = exec_block(base + 16, arguments, environment)
        process_vm.write(frozen.pid, base, struct.pack("<QQ", ALL_SIGNALS, 0) + data)
        self._calls = calls = Calls(injection)
        switches.rows(calls, switches.NORMAL, image.threads[0].switches)  # an exec leaves most as they are
        for fd in closed:
            calls.add("fcntl", fd, _F_SETFD, _FD_CLOEXEC, label=f"descriptor {fd}")
        for fd in cloexec:
            calls.add("fcntl", fd, _F_SETFD, 0, must=False)
        zero = calls.data(bytes(32))
        for which in range(3):
            calls.add("setitimer", which, zero, 0)
        # What the image carries must not reach the ghost as well, which would forward it. Later arrivals stay.
        for info in image.threads[0].pending + image.shared_pending:
            calls.add("rt_sigtimedwait", calls.data(struct.pack("<Q", 1 << (info[0] - 1))), 0, zero, 8, must=False)
        calls.add("rt_sigprocmask", signal.SIG_SETMASK, base, 0, 8)
        calls.add("execveat", program, base + 8, argv, envp, _AT_EMPTY_PATH, label=f"running the {what}")
        self.make_ready()

    def make_ready(self) -> None:
        """Put what it takes into the scratch, where other calls may have been since."""
        self._calls.make_ready()

    def run(self, gone: Callable[[], object]) -> None:
        """Exec, and let the new program run.

        Args:
            gone: called as soon as the old program is sure to run no more.

        Raises:
            OSError: it did not come to the exec; the process is still frozen.
        """
        frozen = self._frozen
        injection = frozen.open_injection()
        options = ptrace.O_TRACESYSGOOD | frozen.options
        ptrace.ptrace(ptrace.SETOPTIONS, injection.tid, 0, options | ptrace.O_TRACEEXEC)
        injection.others = [thread.tid for thread in frozen.threads[1:]]
        if procfs.own_bytes(frozen.pid) >= LARGE:
            injection.while_waiting = _when_replaced(frozen.pid, gone)
        try:
            self._calls.run_until_exec()
        except OSError:
            with contextlib.suppress(OSError):  # it has ended
                ptrace.ptrace(ptrace.SETOPTIONS, injection.tid, 0, options)
                self._undo()
            raise
        finally:
            injection.while_waiting = None
        gone()
        _let_go(frozen)

    def _undo(self) -> None:
        """The process goes on here, with what was taken from it for the new program's sake."""
        calls = Calls(self._frozen.open_injection())
        switches.rows(calls, self._image.threads[0].switches, switches.NORMAL)
        for fd in self._closed:
            calls.add("fcntl", fd, _F_SETFD, 0, must=False)
        for fd in self._cloexec:
            calls.add("fcntl", fd, _F_SETFD, _FD_CLOEXEC, must=False)
        for which, setting in enumerate(self._image.itimers):
            calls.add("setitimer", which, calls.data(setting), 0, must=False)
        pid = self._image.pid
        for info in self._image.threads[0].pending:
            calls.add("rt_tgsigqueueinfo", pid, self._image.threads[0].tid, info[0], calls.data(info), must=False)
        for info in self._image.shared_pending:
            calls.add("rt_sigqueueinfo", pid, info[0], calls.data(info), must=False)
        calls.run()


def ghost_exec(
    frozen: Frozen, image: Image, passed: Passed, environment: list[bytes], closed: Sequence[int] = (),
    arguments: Sequence[bytes] = (),
) -> Exec:  # fmt: skip
    """The exec of the ghost, made ready.

    Args:
        image: with the table of its descriptors.
        passed: what it needs of ours; it finds the number of its control socket in `BPFS_CONTROL`, its death signal
            in `BPFS_DEATHSIG`.
        environment: the rest of its environment.
        closed: descriptors that the ghost does not keep.
        arguments: what ps(1) is to show; none: what it shows now.
    """
    cloexec = [number for entry in image.descriptors for number, closes in entry["fds"] if closes]
    more = [b"BPFS_DEATHSIG=%d" % passed.death_signal, b"BPFS_CONTROL=%d" % passed.control]
    shown = [*arguments] or procfs.read(f"{frozen.live}/cmdline").split(b"\0")[:-1] or [b"ghost"]
    return Exec("ghost", frozen, image, passed.program, shown, [*environment, *more], cloexec, closed)


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
        arguments[1] = b"%d" % passed.control
        environment.append(b"BPFS_CONTROL=%d" % passed.control)
        Exec("placeholder", frozen, image, passed.program, arguments, environment).run(lambda: None)
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


def _when_replaced(pid: int, then: Callable[[], object]) -> Callable[[], object]:
    """What to call time and again: does something, once, when the process has its new memory. The kernel is long in
    its exec then, giving back the old one, 30 ms a GB, and keeps whoever reads exe, maps or stat waiting for that.
    """
    before, done = procfs.own_size(pid), False

    def look() -> None:
        nonlocal done
        if not done:
            done = procfs.own_size(pid) not in (before, 0)  # 0: it has been killed, and ends
            if done:
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
