"""The other threads of a rebuilt process: born by the leader, given their state one after the other, parked until the
resume.

A parked thread stands at code that ends it, so that a process whose worker dies before the commit never runs with
some of its
threads only: it dies, or is a ghost again.
"""

import contextlib
import ctypes
import os
import struct

from engine.image import Image, ThreadState
from engine.linux import ptrace
from engine.linux.libc import syscall
from engine.linux.x86_64 import NR, Registers
from engine.restart import prime
from engine.restore_state import credential_rows, thread_rows
from engine.runner import Calls, Injection, ProcessGone
from engine.target import Target

# <linux/sched.h>: VM FS FILES SIGHAND THREAD SYSVSEM SETTLS
_SHARED = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000 | 0x80000
_CHILD_CLEARTID = 0x200000
_CLONE3_SIZE = 88


class Threads:
    """The threads beside the leader.

    Attributes:
        tids: host tids, in the image's order.
    """

    def __init__(self, target: Target, image: Image) -> None:
        self._target, self._image = target, image
        self.tids: list[int] = []

    @property
    def _states(self) -> list[ThreadState]:
        return self._image.threads[1:]

    def create(self) -> None:
        """Have the leader make them, under their old ids; it must still have the right to choose ids. Raises
        OSError.
        """
        if not self._states:
            return
        leader = self._target.injection
        calls = Calls(leader)
        for state in self._states:
            self._clone_row(calls, state)
        options = ptrace.O_TRACESYSGOOD | (0 if self._target.in_place else ptrace.O_EXITKILL)
        ptrace.ptrace(ptrace.SETOPTIONS, leader.tid, 0, options | ptrace.O_TRACECLONE)
        leader.on_event = self._born
        try:
            calls.run()
        finally:
            leader.on_event = None
            ptrace.ptrace(ptrace.SETOPTIONS, leader.tid, 0, options)
        for tid in self.tids:
            if not ptrace.is_event(ptrace.wait(tid), ptrace.EVENT_STOP):
                raise ProcessGone(self._target.pid)
            ptrace.ptrace(ptrace.SETOPTIONS, tid, 0, options)

    def _born(self) -> None:
        self.tids.append(ptrace.event_message(self._target.injection.tid))
        self._target.threads.append(self.tids[-1])

    @staticmethod
    def _clone_row(calls: Calls, state: ThreadState) -> None:
        registers = Registers.from_buffer_copy(state.registers)
        flags = _SHARED | (_CHILD_CLEARTID if state.clear_tid else 0)
        tid = calls.data(struct.pack("<i", state.tid))
        # flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid set_tid_size cgroup
        arguments = struct.pack("<11Q", flags, 0, state.clear_tid, 0, 0, 0, 0, registers.thread_area, tid, 1, 0)
        calls.add("clone3", calls.data(arguments), _CLONE3_SIZE, label=f"thread {state.tid}")

    def complete(self) -> None:
        """Give each its own state, rights included, and park it."""
        for tid, state in zip(self.tids, self._states, strict=True):
            self._outside(tid, state)
            injection = self._injection(tid, state)
            calls = Calls(injection)
            thread_rows(calls, state, self._image.threads[0].switches)
            credential_rows(calls, self._image, leader=False)
            for info in state.pending:
                calls.add("rt_tgsigqueueinfo", self._image.pid, state.tid, info[0], calls.data(info), must=False)
            calls.run()
            ptrace.set_xstate(tid, state.xstate)
            injection.park()

    def _injection(self, tid: int, state: ThreadState) -> Injection:
        registers = Registers.from_buffer_copy(state.registers)
        return self._target.injection.for_thread(tid, registers, state.mask, self._target.injection.trap)

    @staticmethod
    def _outside(tid: int, state: ThreadState) -> None:
        with contextlib.suppress(OSError):
            policy = ctypes.create_string_buffer(state.policy, 56)
            syscall(NR["sched_setattr"], tid, ctypes.addressof(policy), 0)
        with contextlib.suppress(OSError):
            syscall(NR["ioprio_set"], 1, tid, state.io_priority)
        if state.affinity:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(tid, state.affinity)

    def finish(self, elapsed: float, scratch: int) -> None:
        """Give each the registers that it runs on with; arguments as of `engine.restart.prime`."""
        for tid, state in zip(self.tids, self._states, strict=True):
            ptrace.ptrace(ptrace.SETOPTIONS, tid, 0, ptrace.O_TRACESYSGOOD)
            injection = self._injection(tid, state)
            if state.prime:
                prime(injection, state.prime, elapsed, scratch)
            injection.finish()

    def detach(self) -> None:
        """Let them run."""
        for tid in self.tids:
            with contextlib.suppress(ProcessLookupError):
                ptrace.detach(tid)
