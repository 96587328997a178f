"""The process that is being rebuilt: a fresh child in a job namespace, or a ghost that becomes the process again.

Both offer the same: a stopped process with a scratch, a socket into it for descriptors, and a way to undo.
"""

import contextlib
import itertools
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Final

from engine import note
from engine.freeze import Frozen, find_hole, freeze
from engine.linux import process_vm, procfs, ptrace, scm
from engine.linux.procfs import Vma
from engine.linux.x86_64 import NR
from engine.memory import SPECIAL
from engine.placeholders import find_placeholder, placing
from engine.reserve import end_stand_ins, reserve
from engine.runner import ALL_SIGNALS, HEAL_STRINGS, SCRATCH_SIZE, Calls, Injection, row
from engine.spans import Spans
from engine.spawn import Child, Relative, bear_stand_ins, freeze_patiently, spawn_child
from engine.terminals import Terminal

_AF_UNIX: Final = 1
_SEQPACKET_CLOEXEC: Final = 5 | 0o2000000
_MSG_CMSG_CLOEXEC: Final = 0x40000000
_F_DUPFD: Final = 0
_F_SETFD: Final = 2
_F_DUPFD_CLOEXEC: Final = 1030
_AT_EMPTY_PATH: Final = 0x1000
_TOP: Final = 0x7FFFFFFFF000
_MREMAP_MOVE_FIXED: Final = 3
_REAPED_WITHIN_S: Final = 5.0
_RSEQ_UNREGISTER: Final = 1
_HEAL_ROOM: Final = 60000  # bytes of argv and environment kept for a ghost's way back


class Target:
    """Common part.

    Attributes:
        pid: host pid.
        injection: the way in.
        spans: (start, end) of the mappings the process has now.
        special: name -> (start, end) of its vDSO and vvar.
        own_fds: descriptor numbers in use that a rebuilt descriptor must not disturb before the commit.
        staged: memory of the process that is there already (engine/staging.py).
    """

    home = False  # on the master, in its ghost
    in_place = False  # what is there now is a process that must live on, should this not come about

    def __init__(self, pid: int, injection: Injection, vmas: list[Vma]) -> None:
        self.pid, self.injection = pid, injection
        self.spans = [(v.start, v.end) for v in vmas]
        self.special = {v.path: (v.start, v.end) for v in vmas if v.path in SPECIAL}
        self.sock: socket.socket | None = None
        self.inner_sock = -1
        self.own_fds: list[int] = []
        self.threads: list[int] = []  # host tids beside the leader
        self.staged: Spans = []
        self.pidfd = process_vm.pidfd_open(pid)

    def open_socket(self, calls: Calls) -> int:
        """Add the rows that make a socket pair; returns the address of the two numbers."""
        pair = calls.data(bytes(8))
        calls.add("socketpair", _AF_UNIX, _SEQPACKET_CLOEXEC, 0, pair, label="socket pair")
        return pair

    def take_socket(self, calls: Calls, pair: int) -> None:
        """After the batch ran: fetch our end."""
        self.inner_sock, other = struct.unpack("<ii", calls.read(pair, 8))
        self.sock = socket.socket(fileno=process_vm.pidfd_getfd(self.pidfd, other))
        self.own_fds += [self.inner_sock, other]

    def pass_fds(self, fds: list[int]) -> list[int]:
        """Give descriptors to the process; returns their numbers there, in order."""
        calls = Calls(self.injection)
        numbers, check = self.add_fds(calls, fds)
        calls.run()
        check()
        return numbers

    def add_fds(self, calls: Calls, fds: list[int]) -> tuple[list[int], Callable[[], None]]:
        """Add the rows that receive descriptors; returns the numbers that they will have, and a check that they do."""
        if not fds:
            return [], lambda: None
        assert self.sock is not None
        packets = scm.send_fds(self.sock, fds)
        blocks = [calls.reserve_block() for _ in range(packets)]
        for block in blocks:
            calls.add("recvmsg", self.inner_sock, block, _MSG_CMSG_CLOEXEC, label="receiving descriptors")
        taken = set(self.own_fds)
        numbers = list(itertools.islice((n for n in itertools.count() if n not in taken), len(fds)))
        self.own_fds += numbers

        def check() -> None:
            found: list[int] = []
            for block in blocks:
                found += scm.received_fds(calls.read(block + scm.CONTROL_OFFSET, 1024))
            if found != numbers:
                raise OSError(24, f"only {len(found)} of {len(fds)} descriptors could be passed on")

        return numbers, check

    def move_scratch(self, taken: list[tuple[int, int]]) -> None:
        """Move the scratch out of the way of mappings to come."""
        inj = self.injection
        guard = 4096
        if not any(first < inj.base + SCRATCH_SIZE + guard and inj.base - guard < last for first, last in taken):
            return
        hole = find_hole(taken + self.spans + self.staged + [(inj.base, inj.base + SCRATCH_SIZE)], SCRATCH_SIZE)
        inj.call("mremap", inj.base, SCRATCH_SIZE, SCRATCH_SIZE, _MREMAP_MOVE_FIXED, hole, subject="moving the scratch")
        inj.adopt(hole)
        self.scratch_moved(hole)

    def scratch_moved(self, base: int) -> None:
        """The scratch is at `base` now."""

    def unmap_all(self, calls: Calls) -> None:
        """Add the rows that drop everything but scratch, vvar and vDSO."""
        pointer, size, signature, _ = ptrace.rseq_configuration(self.pid)
        if pointer:  # the kernel would go on writing there
            calls.add("rseq", pointer, size, _RSEQ_UNREGISTER, signature)
        base = self.injection.base
        kept = sorted([(base, base + SCRATCH_SIZE), *self.special.values(), *self.staged])
        at = 0
        for first, last in [*kept, (_TOP, _TOP)]:
            if first > at:
                calls.add("munmap", at, first - at)
            at = last
        self.spans = kept

    def close(self) -> None:
        """Close the worker's descriptors."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        if self.pidfd >= 0:
            os.close(self.pidfd)
            os.close(self.injection.memory)
            self.pidfd = -1

    def discard(self) -> None:
        """Undo: nothing of the rebuilt process stays."""
        raise NotImplementedError

    def pending(self) -> set[int]:
        """Signals that wait in its queues."""
        return set()

    def begin_rebuilding(self) -> None:
        """The old contents are about to go."""

    def keep_above(self, calls: Calls, high: int) -> int:
        """Add rows that keep what the way back needs at numbers from `high`; returns how many."""
        del calls, high
        return 0

    def before_resume(self, high: int) -> None:
        """The commit: from here on the process outlives its tracer. `high`: first number of descriptors that are not
        its own.
        """
        raise NotImplementedError


class Fresh(Target):
    """A new child in the job namespace of a node."""

    def __init__(self, child: Child, init: int) -> None:
        super().__init__(child.pid, child.injection, child.vmas)
        self._init = init
        self.stand_ins: list[int] = []
        """Job pids of placeholders that are its children."""

    def before_resume(self, high: int) -> None:
        del high
        ptrace.ptrace(ptrace.SETOPTIONS, self.pid, 0, ptrace.O_TRACESYSGOOD)

    def discard(self) -> None:
        """Kill it and wait for its end as its tracer; its parent reaps it."""
        # They would keep its pid in use: the group or session that it leads.
        kept: dict[int, int] = {}
        with contextlib.suppress(OSError):
            kept = end_stand_ins(self._init, self.stand_ins)
        _kill([*self.threads, self.pid], self.pidfd)
        self.close()
        with contextlib.suppress(OSError):
            reserve(self._init, kept)


def _kill(tids: list[int], pidfd: int) -> None:
    # The leader comes last: its end is reported when the others have been reaped.
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    for tid in tids:
        with contextlib.suppress(OSError):
            while os.WIFSTOPPED(ptrace.wait(tid)):
                pass


def place_child(
    init: int, pid: int, ppid: int, pgid: int, sid: int, uid: int = 0, terminal: str = "", front: bool = True,
    children: Sequence[Relative] = (),
) -> Target:  # fmt: skip
    """Make the stopped child under its placeholders, empty, with a socket into it.

    Args:
        init: host pid of nodeinit.
        pid, ppid, pgid, sid: as the process has them where it comes from (cluster pids).
        uid: its real uid.
        terminal: path of the pseudo-terminal that stands for its controlling terminal; empty: it gets none.
        front: it is in its terminal's foreground at home.
        children: its children that are elsewhere: stand-ins for them become its children here.

    Raises:
        FileExistsError: the pid is in use there.
        OSError: the namespace is gone.
    """
    tty = Terminal(init, (pid, pgid, sid), terminal, front)
    standing = _seize_standing(init, pid, pgid, sid, children, tty)
    if standing is not None:
        return standing
    with placing(init, pid, ppid, pgid, sid, uid, tty.offer) as place:
        child = _spawn_patiently(place.maker, pid, place.sibling)
        target = Fresh(child, init)
        try:
            calls = Calls(target.injection)
            if place.setsid:
                calls.add("setsid", must=False)
            if place.pgid is not None:
                calls.add("setpgid", 0, place.pgid, label=f"process group {place.pgid}")
            if children:
                calls.run()
                tty.settle(target.injection)
                target.stand_ins = [one.pid for one in children]
                bear_stand_ins(child, children)
                calls = Calls(target.injection)
            calls.add("close_range", 0, 0xFFFFFFFF, 0)
            tty.add_rows(calls)
            pair = target.open_socket(calls)
            target.unmap_all(calls)
            calls.run()
            target.take_socket(calls, pair)
        except BaseException:
            target.discard()
            raise
    return target


def _seize_standing(
    init: int, pid: int, pgid: int, sid: int, children: Sequence[Relative], tty: Terminal
) -> Target | None:
    """The placeholder with this pid, seized; None where there is none."""
    hostpid, missing = find_placeholder(init, pid, [child.pid for child in children])
    if hostpid is None:
        return None
    frozen = freeze_patiently(hostpid)
    try:
        frozen.vmas = procfs.parse_maps(procfs.read(f"{frozen.live}/maps"))
        target = Standing(frozen)
    except BaseException:
        frozen.release()
        raise
    try:
        calls = Calls(target.injection)
        if sid == pid:
            calls.add("setsid", must=False)
        calls.add("setpgid", 0, pgid, must=False)
        calls.run()
        tty.settle(target.injection)
        child = Child(hostpid, target.injection, frozen.vmas, frozen.threads[0].registers)
        bear_stand_ins(child, [one for one in children if one.pid in missing], kill=False)
    except BaseException:
        target.discard()
        raise
    return target


def _spawn_patiently(maker: int, pid: int, sibling: bool) -> Child:
    # Its predecessor under this pid may have left a moment ago and wait, dead, for its parent to take notice.
    deadline = time.monotonic() + _REAPED_WITHIN_S
    while True:
        try:
            return spawn_child(maker, pid, sibling)
        except FileExistsError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.002)


class Home(Target):
    """A ghost on the master that becomes the process again.

    Until `burn` it is a frozen ghost that can simply be released; from then on its heal table runs the ghost program
    anew.
    """

    home = True
    in_place = True

    again: tuple[bytes, ...] = ()  # in the environment of the program when it is run anew

    def __init__(self, frozen: Frozen) -> None:
        self.frozen = frozen
        injection = frozen.open_injection()
        super().__init__(frozen.pid, injection, frozen.vmas)
        environment = procfs.read(f"/proc/{frozen.pid}/environ").split(b"\0")[:-1]
        self.control = next((int(e[13:]) for e in environment if e.startswith(b"BPFS_CONTROL=")), -1)
        self._environment = [*environment, *self.again]
        self._arguments = procfs.read(f"/proc/{frozen.pid}/cmdline").split(b"\0")[:-1]
        self.own_fds = sorted(int(name) for name in os.listdir(f"/proc/{frozen.pid}/fd"))
        self._original = set(self.own_fds)
        self.burnt = False
        calls = Calls(injection)
        pair = self.open_socket(calls)
        calls.run()
        self.take_socket(calls, pair)
        # By the mount that it was run from: where that grants it rights, it does so again.
        program = os.open(f"/proc/{frozen.pid}/exe", os.O_PATH | os.O_CLOEXEC)
        try:
            self.exe_fd = self.pass_fds([program])[0]
        finally:
            os.close(program)

    def scratch_moved(self, base: int) -> None:
        self.frozen.write_note(base)

    def pending(self) -> set[int]:
        bits = int(self.frozen.status["SigPnd"], 16) | int(self.frozen.status["ShdPnd"], 16)
        return {n for n in range(1, 65) if bits >> (n - 1) & 1}

    def begin_rebuilding(self) -> None:
        """From here on the way back is to run the ghost program anew."""
        self.burnt = True
        self._way_back([])

    def keep_above(self, calls: Calls, high: int) -> int:
        calls.add("fcntl", self.control, _F_DUPFD, high, must=self.control >= 0, label="control socket")
        calls.add("fcntl", self.exe_fd, _F_DUPFD_CLOEXEC, high + 1, label="ghost program")
        # Each works at any moment of the batch: the first two fail, harmlessly, before the duplicates are there.
        self._way_back([row(NR["dup3"], high, self.control, 0, must=False)], high + 1)
        return 2

    def before_resume(self, high: int) -> None:
        self.injection.call("close_range", high, 0xFFFFFFFF, 0)

    def _way_back(self, first: list[bytes], program: int = -1) -> None:
        strings = HEAL_STRINGS + self.injection.base
        argv, envp = self._vectors(strings)
        rows = [row(NR["rt_sigprocmask"], 0, strings, 0, 8, must=False)]
        rows += [row(NR["fcntl"], self.control, _F_SETFD, 0, must=False), *first]  # the ghost keeps it close-on-exec
        rows += [
            row(NR["execveat"], fd, strings + 8, argv, envp, _AT_EMPTY_PATH, must=False)
            for fd in (program, self.exe_fd)
            if fd >= 0
        ]
        self.injection.set_heal([*rows, row(NR["exit_group"], 1)])

    def _vectors(self, strings: int) -> tuple[int, int]:
        # [all signals][""][argv pointers][envp pointers][texts]
        data, argv, envp = exec_block(strings + 16, self._arguments, self._environment)
        process_vm.write(self.pid, strings, struct.pack("<QQ", ALL_SIGNALS, 0) + data)
        return argv, envp

    def discard(self) -> None:
        """Let the ghost go on, or run it anew."""
        try:
            if not self.burnt:
                self.close_extra()
                if self.sock is not None:
                    self.sock.close()
                    self.sock = None
                os.close(self.pidfd)
                self.pidfd = -1
                self.frozen.release()
                return
            for tid in self.threads:  # parked: it ends
                ptrace.detach(tid)
            # Detached in the runner's stop, it heals: the very way it goes when this worker dies.
            calls = Calls(self.injection)
            calls.add("getpid")
            calls.run()
            ptrace.detach(self.pid)
            note.erase()
        except Exception:
            # Dead already, or in no state to go on: its end is better than a process that is neither.
            _kill([*self.threads, self.pid], self.pidfd)
        self.close()

    def close_extra(self) -> None:
        """Close what we opened in the ghost."""
        calls = Calls(self.injection)
        for fd in set(self.own_fds) - self._original:
            calls.add("close", fd, must=False)
        calls.run()


class Standing(Home):
    """A placeholder that becomes the process that it stands for: its parent and its children stay what they are."""

    home = False
    again = (b"BPFS_PLACEHOLDER=1",)


def exec_block(
    base: int, arguments: list[bytes], environment: list[bytes], room: int = _HEAL_ROOM
) -> tuple[bytes, int, int]:
    """Memory for execve at `base`: (bytes, address of argv, address of envp). Arguments that do not fit are dropped
    from the end.
    """
    while len(arguments) > 1 and sum(len(a) + 9 for a in arguments + environment) + 16 > room:
        arguments = arguments[:-1]
    texts = b""
    pointers: list[int] = []
    text_base = base + 8 * (len(arguments) + len(environment) + 2)
    for item in arguments + environment:
        pointers.append(text_base + len(texts))
        texts += item + b"\0"
    argv = struct.pack(f"<{len(arguments) + 1}Q", *pointers[: len(arguments)], 0)
    envp = struct.pack(f"<{len(environment) + 1}Q", *pointers[len(arguments) :], 0)
    return argv + envp + texts, base, base + len(argv)


def seize_ghost(pid: int) -> Home:
    """Freeze the ghost and put the runner into it.

    Raises:
        OSError: it has ended or cannot be seized.
    """
    frozen = freeze(pid)
    try:
        return Home(frozen)
    except BaseException:
        frozen.release()
        raise
