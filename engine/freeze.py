"""Seize and stop every thread of a process, and let it go again as if nothing had been.

freeze -> settle -> (work on it) -> release. A dead tracer is harmless at any moment: the kernel lets the threads run.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from engine import note
from engine.linux import procfs, ptrace
from engine.linux.procfs import Vma
from engine.linux.x86_64 import Registers
from engine.restart import Sleep, adjust, look_at_sleep
from engine.runner import SCRATCH_SIZE, TRAP_SIGNALS, Injection, ProcessGone

STOP_TIMEOUT_S: Final = 10.0
# One that is in an uninterruptible call for that long is not just waiting for a busy disk, or for the processor.
_BLOCKED_S: Final = 3.0
# Spin this long for a stop before sleeping between looks: a stop takes some 30 us, a sleep three times as much.
_SEIZE_PATIENCE_S: Final = 0.5
_TRACER_PATIENCE_S: Final = 2.0
_SPIN_S: Final = 0.002
_VFORK_PATIENCE_S: Final = 0.5  # a child of posix_spawn execs within a millisecond
_FORKS: Final = (b"56", b"58", b"435")  # clone, vfork, clone3
_LOWEST_SCRATCH: Final = 0x10000  # mmap_min_addr


@dataclass(slots=True)
class Thread:
    """One seized thread; registers and mask as they were at the stop."""

    tid: int
    sleep: Sleep | None = None  # what /proc said before the freeze
    registers: Registers = field(default_factory=Registers)
    mask: int = 0
    stopped: bool = False  # our stop has been waited for
    zombie: bool = False
    status: dict[str, str] = field(default_factory=dict)  # of the others than the first, once asked for
    again: int = 0  # an interrupted call with a time in a register, which is made again


class InVfork(OSError):
    """The process cannot stop before its child runs another program or ends."""

    def __init__(self) -> None:
        super().__init__(95, "it waits for a child that it has by vfork and that runs in its memory")


class Frozen:
    """A process with every thread seized.

    Attributes:
        pid: host pid.
        threads: the live ones, leader first unless it has exited.
        status: `/proc/PID/status` as key -> text, read once stopped.
        group_stopped: it is stopped by job control.
    """

    def __init__(self, pid: int, sleeps: bool = True) -> None:
        self.pid = pid
        self._sleeps = sleeps
        self.threads: list[Thread] = []
        self.group_stopped = False
        self.leader_exited = False
        self.status: dict[str, str] = {}
        self.vmas: list[Vma] = []
        self.memory = -1
        self.injection: Injection | None = None
        self.fresh = False  # stopped at its exec
        self.options = 0  # further ones of ptrace(2) for as long as it is held
        self.settled = 0.0  # time.monotonic() when all stood

    @property
    def live(self) -> str:
        """/proc directory of a live thread: the leader's is empty once it has exited."""
        return f"/proc/{self.pid}/task/{self.threads[0].tid}"

    def settle(self) -> None:
        """Wait until all threads stand, then read what every later step needs.

        Raises:
            TimeoutError: a thread would not stop within 3 s (uninterruptible), or 10 s.
            ProcessGone: it ended meanwhile.
        """
        deadline = time.monotonic() + STOP_TIMEOUT_S
        self._collect(deadline)
        while self._seize_new():
            self._collect(deadline)
        self.settled = time.monotonic()
        self.threads = [t for t in self.threads if not t.zombie]
        if not self.threads:
            raise ProcessGone(self.pid)
        self.leader_exited = self.threads[0].tid != self.pid
        for thread in self.threads:
            thread.registers = ptrace.get_registers(thread.tid)
            thread.mask = ptrace.get_mask(thread.tid)
        self.status = procfs.parse_status(procfs.read(f"{self.live}/status"))
        self.memory = os.open(f"{self.live}/mem", os.O_RDWR | os.O_CLOEXEC)
        for thread in self.threads if self._sleeps else ():
            adjust(self, thread)

    def run_on(self, threads: list[Thread], pause_s: float) -> None:
        """Let some threads of the settled process run for a moment, and stop them again. Raises as `settle`."""
        for thread in threads:
            thread.stopped = False
            ptrace.ptrace(ptrace.CONT, thread.tid)
        time.sleep(pause_s)
        for thread in threads:
            with contextlib.suppress(ProcessLookupError):
                ptrace.interrupt(thread.tid)
        self.close()
        self.vmas = []
        self.settle()

    def status_of(self, thread: Thread) -> dict[str, str]:
        """`/proc/PID/task/TID/status`: signal sets differ between threads."""
        if thread is self.threads[0]:
            return self.status
        if thread.status:
            return thread.status
        thread.status = procfs.parse_status(procfs.read(f"/proc/{self.pid}/task/{thread.tid}/status"))
        return thread.status

    def _seize_new(self) -> bool:
        known = {t.tid for t in self.threads}
        try:
            fresh = [tid for tid in procfs.threads(self.pid) if tid not in known]
        except FileNotFoundError:
            raise ProcessGone(self.pid) from None
        with self._reaping() if len(known) + len(fresh) > 1 else contextlib.nullcontext():
            for tid in fresh:
                self._seize(tid)
        return bool(fresh)

    @contextlib.contextmanager
    def _reaping(self) -> Iterator[None]:
        """Have the end of threads noticed while we wait to seize the next.

        Where one thread execs meanwhile, it waits for the end of those that we have seized already, and our next seize
        waits for its exec. Any thread of the tracer's process may reap them.
        """
        done = threading.Event()

        def reap() -> None:
            while not done.wait(_SEIZE_PATIENCE_S):
                for thread in list(self.threads):
                    with contextlib.suppress(ChildProcessError):
                        ptrace.reap(thread.tid)

        helper = threading.Thread(target=reap, daemon=True)
        helper.start()
        try:
            yield
        finally:
            done.set()
            helper.join()

    def _seize(self, tid: int) -> None:
        thread = Thread(tid)
        try:
            state = procfs.parse_stat(procfs.read(f"/proc/{self.pid}/task/{tid}/stat")).state
            thread.sleep = look_at_sleep(self.pid, tid) if state == "S" and self._sleeps else None
            ptrace.seize(tid, ptrace.O_TRACESYSGOOD)
        except (FileNotFoundError, ProcessLookupError):
            return  # ended meanwhile
        except PermissionError:
            if state not in "ZX":
                raise
            thread.zombie = True
        self.threads.append(thread)
        # One that job control has stopped reports its stop to the new tracer by itself.
        if state != "T" and not thread.zombie:
            with contextlib.suppress(ProcessLookupError):  # it is ending: that is what the wait will see
                ptrace.interrupt(tid)

    def _collect(self, deadline: float) -> None:
        for thread in self.threads:
            if not thread.stopped and not thread.zombie:
                self._wait_stop(thread, deadline)

    def _wait_stop(self, thread: Thread, deadline: float) -> None:
        spin = time.monotonic() + _SPIN_S
        while True:
            try:
                status = ptrace.wait_nohang(thread.tid)
            except ChildProcessError:  # reaped already
                thread.zombie = True
                return
            if status is None:
                now = time.monotonic()
                if now > spin + _VFORK_PATIENCE_S and _waits_for_child(thread.tid):
                    raise InVfork
                if now > deadline or (now > spin + _BLOCKED_S and _is_blocked(thread.tid)):
                    raise TimeoutError(
                        110, f"thread {thread.tid} does not stop: it is in an uninterruptible system call"
                    )
                if now < spin:
                    os.sched_yield()
                else:
                    time.sleep(0.0002)
            elif not os.WIFSTOPPED(status):
                thread.zombie = True
                return
            elif status >> 16 == ptrace.EVENT_STOP:
                thread.stopped = True
                self.group_stopped |= os.WSTOPSIG(status) != signal.SIGTRAP
                return
            else:  # a signal on its way: let it have it, our stop comes right after
                ptrace.ptrace(ptrace.CONT, thread.tid, 0, os.WSTOPSIG(status) if status >> 16 == 0 else 0)

    def open_injection(self, existing: int = 0) -> Injection:
        """Map the scratch and put the call runner into the process (once).

        Args:
            existing: address of a scratch mapping that the process has already.

        Raises:
            OSError: no address space is left for it.
        """
        if self.injection is None:
            if not self.vmas:
                self.vmas = procfs.parse_maps(procfs.read(f"{self.live}/maps"))
            thread = self.threads[0]
            vdso = next((v.start for v in self.vmas if v.path == "[vdso]"), 0)
            if not vdso:
                raise OSError(95, "it has no vDSO")
            choice = choose_trap(self.status)
            injection = Injection(self.pid, thread.tid, self.memory, vdso, thread.registers, thread.mask, choice)
            if existing:
                injection.adopt(existing)
            else:
                hole = find_hole([(v.start, v.end) for v in self.vmas], SCRATCH_SIZE)
                self.write_note(hole)
                injection.enter(hole)
            self.injection = injection
        return self.injection

    def write_note(self, base: int) -> None:
        """Have a scratch at `base` taken away should this worker be killed."""
        stat = procfs.parse_stat(procfs.read(procfs.own_file(self.pid, "stat")))
        note.write(self.pid, stat.starttime, base, SCRATCH_SIZE)

    def has_scratch(self, address: int, length: int) -> bool:
        """Whether a scratch of ours is mapped there."""
        self.vmas = procfs.parse_maps(procfs.read(f"{self.live}/maps"))
        found = [
            v for v in self.vmas if v.start == address and v.end == address + length and v.prot == 7 and not v.path
        ]
        return bool(found)

    def drop_scratch(self, address: int) -> None:
        """Take over a scratch that a dead worker left; `release` unmaps it."""
        self.open_injection(existing=address)

    def release(self, failure: int = 0) -> None:
        """Take everything back and let the process run on.

        Args:
            failure: an errno that the interrupted (and finished) system call shall return instead of its result.
        """
        try:
            if failure:
                self.threads[0].registers.result = -failure
            if self.injection is not None:
                injection = self.injection
                injection.write_slot()
                injection.leave()
                note.erase()
                if injection.stopped_by:
                    os.kill(self.pid, injection.stopped_by)
        except (ProcessLookupError, ProcessGone, ChildProcessError):
            pass  # killed meanwhile: nothing to take back
        finally:
            # The leader last: should it exec at once, none of the others is ours any more; and its end comes last.
            for thread in reversed(self.threads):
                self._let_go(thread)
            self.close()

    def _let_go(self, thread: Thread) -> None:
        try:
            if thread.stopped:
                ptrace.set_mask(thread.tid, thread.mask)
                ptrace.set_registers(thread.tid, thread.registers)
            ptrace.detach(thread.tid)
        except ProcessLookupError:  # killed: its parent, or an exec, waits for us to take notice
            with contextlib.suppress(OSError):
                while os.WIFSTOPPED(ptrace.wait(thread.tid)):
                    pass

    def close(self) -> None:
        """Close what the worker holds of it (no effect on the process)."""
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1


def freeze(pid: int, wait: bool = True, sleeps: bool = True) -> Frozen:
    """Seize and stop a process.

    Args:
        wait: False returns before the stops (the process waits in a system call that the caller has to answer first).
        sleeps: False for a program that does not mind an EINTR.

    Raises:
        ProcessLookupError: there is none, or one that has ended and is not waited for yet.
        PermissionError: it is traced already, or the caller may not.
        TimeoutError: it does not stop.
    """
    deadline = time.monotonic() + _TRACER_PATIENCE_S
    while True:
        frozen = Frozen(pid, sleeps)
        try:
            if not frozen._seize_new():
                raise ProcessLookupError(3, os.strerror(3), f"process {pid}")
            if wait:
                frozen.settle()
            return frozen
        except PermissionError as error:
            abandon(frozen)
            if procfs.has_ended(f"/proc/{pid}/task/{pid}"):
                raise ProcessGone(pid) from None
            if time.monotonic() > deadline or not _is_held_by_us(pid):
                raise PermissionError(error.errno, tracing(pid) or f"process {pid}: {error.strerror}") from None
            time.sleep(0.002)
        except (InVfork, TimeoutError):
            abandon(frozen, 0.0)  # who has not stopped yet will not soon: the end of this worker does the rest
            raise
        except BaseException:
            abandon(frozen)
            raise


def tracing(pid: int) -> str:
    """In words, who traces a process; empty when nobody does."""
    try:
        tracer = procfs.parse_status(procfs.read(procfs.own_file(pid, "status")))["TracerPid"]
        name = os.fsdecode(procfs.read(f"/proc/{tracer}/comm").strip()) if tracer != "0" else ""
    except (OSError, KeyError):
        return ""
    return f"it is traced by process {tracer} ({name})" if name else ""


def unseized(pid: int) -> Frozen:
    """A process to be looked at as it runs, with nothing but its `/proc`. Raises OSError."""
    frozen = Frozen(pid)
    frozen.threads = [Thread(pid)]
    frozen.status = procfs.parse_status(procfs.read(procfs.own_file(pid, "status")))
    return frozen


def _is_held_by_us(pid: int) -> bool:
    """Whether another worker has it, or whoever cleans up after one: that does not take long."""
    try:
        tracer = procfs.parse_status(procfs.read(procfs.own_file(pid, "status")))["TracerPid"]
        return tracer == "0" or procfs.read(f"/proc/{tracer}/comm").startswith(b"bpfs-")
    except OSError:
        return False


def _is_blocked(tid: int) -> bool:
    try:
        return procfs.parse_stat(procfs.read(procfs.own_file(tid, "stat"))).state == "D"
    except OSError:
        return False


def in_vfork(pid: int) -> bool:
    """Whether a thread of it waits for a child that runs in its memory."""
    try:
        return any(_waits_for_child(tid) for tid in procfs.threads(pid))
    except FileNotFoundError:
        return False


def _waits_for_child(tid: int) -> bool:
    try:
        state = procfs.parse_stat(procfs.read(procfs.own_file(tid, "stat"))).state
        number = procfs.read(f"/proc/{tid}/syscall").split()[0]
    except (OSError, IndexError):
        return False
    return state == "D" and number in _FORKS


def abandon(frozen: Frozen, patience_s: float = STOP_TIMEOUT_S) -> None:
    """Give up a freeze at whatever point it is: threads that stand are detached, the rest when their stop comes."""
    deadline = time.monotonic() + patience_s
    for thread in frozen.threads:
        with contextlib.suppress(OSError):
            if not thread.zombie and not thread.stopped:
                frozen._wait_stop(thread, deadline)
            if not thread.zombie:
                ptrace.detach(thread.tid)
    frozen.close()


def choose_trap(status: dict[str, str], taken: int = 0) -> int:
    """A signal that does nothing to this process: its default is to be ignored, nobody catches it and none is pending.

    Returns:
        0 when there is none: the process is then stopped at each call.
    """
    unfit = int(status["SigCgt"], 16) | int(status["SigPnd"], 16) | int(status["ShdPnd"], 16) | taken
    for number in TRAP_SIGNALS:
        if not unfit >> (number - 1) & 1:
            return number
    return 0


def find_hole(spans: list[tuple[int, int]], size: int, lowest: int = _LOWEST_SCRATCH) -> int:
    """Lowest page-aligned address with `size` bytes free and a page to spare on both sides."""
    at = lowest
    for first, last in sorted(spans):
        if first >= at + size + 4096:
            break
        at = max(at, last + 4096)
    return at
