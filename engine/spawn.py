"""Give birth to a process with a chosen pid, as child (or sibling) of a process of the job namespace.

The parent, nodeinit or one of its clones, is stopped, makes one clone3 and runs on; the child is born stopped, traced
by the
caller and dies with it, until it is released.
"""

import os
import signal
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine.freeze import Frozen, freeze
from engine.linux import procfs, ptrace
from engine.linux.procfs import Vma
from engine.linux.x86_64 import Registers
from engine.runner import ALL_SIGNALS, SCRATCH_SIZE, Calls, Injection, ProcessGone

NODEINIT_SCRATCH: Final = 0x10000  # csrc/nodeinit.h maps SCRATCH_SIZE bytes there for us
_CLONE_PARENT: Final = 0x8000
_CLONE3_SIZE: Final = 88  # struct clone_args up to cgroup (Linux 5.7)
_OPTIONS: Final = ptrace.O_TRACESYSGOOD | ptrace.O_TRACECLONE | ptrace.O_TRACEFORK | ptrace.O_TRACEVFORK
_PATIENCE_S: Final = 5.0  # other workers hold the parent for well under a millisecond


@dataclass(frozen=True, slots=True)
class Relative:
    """A process that is elsewhere, with the ids that its stand-in shall have (cluster pids)."""

    pid: int
    pgid: int
    sid: int
    uid: int


class Child:
    """A stopped process with a scratch and nothing of its own.

    Attributes:
        pid: host pid.
        vmas: its mappings, copies of the parent's.
        loop: the parent's registers, in nodeinit's loop.
    """

    def __init__(self, pid: int, injection: Injection, vmas: list[Vma], loop: Registers) -> None:
        self.pid, self.injection, self.vmas, self.loop = pid, injection, vmas, loop

    def close(self) -> None:
        """Close what the worker holds; does not end the process."""
        os.close(self.injection.memory)


def spawn_child(parent: int, pid: int, sibling: bool = False) -> Child:
    """Clone the parent under a chosen pid.

    Args:
        parent: host pid of nodeinit, a placeholder or another process with CAP_CHECKPOINT_RESTORE.
        pid: the child's pid in the parent's pid namespace.
        sibling: the child's parent is the parent's own (CLONE_PARENT).

    Raises:
        FileExistsError: the pid is taken.
        OSError: the parent has ended or is held by another tracer for too long.
    """
    frozen = freeze_patiently(parent)
    try:
        frozen.vmas = procfs.parse_maps(procfs.read(f"{frozen.live}/maps"))
        injection = _open(frozen)
        hostpid = _clone(frozen, injection, pid, sibling)
        return _adopt(hostpid, frozen, injection)
    finally:
        if frozen.injection is not None and frozen.injection.base == NODEINIT_SCRATCH:
            frozen.injection.base = 0  # it stays
        frozen.release()


def freeze_patiently(pid: int) -> Frozen:
    """Freeze nodeinit or a placeholder. Raises OSError."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return freeze(pid, sleeps=False)  # nodeinit asks again
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.0005)


def _open(frozen: Frozen) -> Injection:
    scratch = [
        v for v in frozen.vmas if v.start == NODEINIT_SCRATCH and v.end - v.start == SCRATCH_SIZE and v.prot == 7
    ]
    return frozen.open_injection(existing=NODEINIT_SCRATCH if scratch else 0)


def _clone(frozen: Frozen, injection: Injection, pid: int, sibling: bool) -> int:
    ptrace.ptrace(ptrace.SETOPTIONS, frozen.pid, 0, _OPTIONS)
    flags, exit_signal = (_CLONE_PARENT, 0) if sibling else (0, int(signal.SIGCHLD))
    try:
        return _clone3(frozen.pid, injection, pid, flags, exit_signal)
    finally:
        ptrace.ptrace(ptrace.SETOPTIONS, frozen.pid, 0, ptrace.O_TRACESYSGOOD)


def _clone3(parent: int, injection: Injection, pid: int, flags: int, exit_signal: int) -> int:
    calls = Calls(injection)
    tid = calls.data(struct.pack("<i", pid))
    # flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid set_tid_size cgroup
    arguments = struct.pack("<11Q", flags, 0, 0, 0, exit_signal, 0, 0, 0, tid, 1, 0)
    calls.add("clone3", calls.data(arguments), _CLONE3_SIZE, label=f"pid {pid}")
    children: list[int] = []
    injection.on_event = lambda: children.append(ptrace.event_message(parent))
    try:
        calls.run()
    finally:
        injection.on_event = None
    return children[0]


def _adopt(hostpid: int, frozen: Frozen, parent: Injection) -> Child:
    if not ptrace.is_event(ptrace.wait(hostpid), ptrace.EVENT_STOP):
        raise ProcessGone(hostpid)
    ptrace.ptrace(ptrace.SETOPTIONS, hostpid, 0, ptrace.O_TRACESYSGOOD | ptrace.O_EXITKILL)
    memory = os.open(f"/proc/{hostpid}/mem", os.O_RDWR | os.O_CLOEXEC)
    registers = ptrace.get_registers(hostpid)
    injection = Injection(hostpid, hostpid, memory, parent.vdso, registers, ALL_SIGNALS, signal.SIGURG)
    injection.adopt(parent.base)
    return Child(hostpid, injection, list(frozen.vmas), frozen.threads[0].registers)


def bear_stand_ins(parent: Child, relatives: Sequence[Relative], kill: bool = True) -> None:
    """Give a process in the making, a clone of nodeinit still, children that stand for its real ones elsewhere.

    They are placeholders that end, stop and continue on command, so that the parent waits for them natively.

    Args:
        kill: the parent dies with us.

    Raises:
        FileExistsError: one of the pids is taken.
        OSError: no more processes, or the parent was killed.
    """
    if not relatives:
        return
    exit_kill = ptrace.O_EXITKILL if kill else 0
    ptrace.ptrace(ptrace.SETOPTIONS, parent.pid, 0, _OPTIONS | exit_kill)
    try:
        # Group leaders first: the others join their groups.
        for relative in sorted(relatives, key=lambda one: one.pid != one.pgid):
            _bear_stand_in(parent, relative)
    finally:
        ptrace.ptrace(ptrace.SETOPTIONS, parent.pid, 0, ptrace.O_TRACESYSGOOD | exit_kill)


def _bear_stand_in(parent: Child, relative: Relative) -> None:
    hostpid = _clone3(parent.pid, parent.injection, relative.pid, 0, signal.SIGCHLD)
    if not ptrace.is_event(ptrace.wait(hostpid), ptrace.EVENT_STOP):
        raise ProcessGone(hostpid)
    memory = os.open(f"/proc/{hostpid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        registers = ptrace.get_registers(hostpid)
        injection = Injection(hostpid, hostpid, memory, parent.injection.vdso, registers, ALL_SIGNALS, signal.SIGURG)
        injection.adopt(parent.injection.base)
        calls = Calls(injection)
        if relative.sid == relative.pid:
            calls.add("setsid", must=False)
        calls.add("setpgid", 0, relative.pgid, must=False)
        calls.add("setresuid", relative.uid, 0, 0)
        calls.run()
    finally:
        os.close(memory)
    ptrace.set_registers(hostpid, parent.loop)
    ptrace.set_mask(hostpid, ALL_SIGNALS)
    ptrace.detach(hostpid)
