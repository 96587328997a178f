"""Make system calls inside a stopped process, so that it survives the death of its tracer at any moment.

Two ways in:

* the **gate**: one system call by a few instructions in the unused tail of the process's vDSO page (the kernel gives
the
  process its own copy of that page; no mapping changes). After the call the code puts mask and registers back by
  itself.
* the **runner** (csrc/runner.S) in an anonymous *scratch* mapping that the gate made: a whole table of calls in one
stop.

Stops are system-call stops (gate) and delivery stops of a signal that the process ignores (runner): neither does
anything to
a process whose tracer is gone. int3 and single-stepping would kill it with SIGTRAP.
"""

import contextlib
import ctypes
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from engine.linux import process_vm, ptrace, scm, x86_64
from engine.linux.libc import error_text, is_error
from engine.linux.x86_64 import NR, Registers

CODE: Final = Path(__file__).parent / "bin" / "runner.bin"
CODE_BYTES: Final = CODE.read_bytes()
SCRATCH_SIZE: Final = 0x40000
_SLOT: Final = 0x1000
_SECOND_SLOT: Final = 0x1800  # of whichever other thread makes calls at the moment
_PARKED: Final = 16  # offset of csrc/runner.S: the thread ends there, should the tracer die
_HEAL: Final = 0x1400  # heal table of the leader's slot
_TABLE: Final = 0x2000
_DATA: Final = 0x10000
RESUME_DATA: Final = _DATA  # offset; used once the tables are done with
HEAL_STRINGS: Final = 0x30000  # offset; 64 KB for what a heal table refers to
_ROW: Final = 64
_RESULT: Final = struct.Struct("<56xq")  # of a row
MAX_ROWS: Final = (_DATA - _TABLE) // _ROW
ALL_SIGNALS: Final = 0xFFFFFFFFFFFFFFFF
_SYSGOOD: Final = signal.SIGTRAP | 0x80
_NONE: Final = (0,) * 6
_pack_row = struct.Struct("<II7Q").pack  # the second is whether it must not fail
_UNMADE: Final = 1 << 62  # result of a row that has not been made: no call returns that
_PROT_RWX: Final = 7
_MAP_FIXED_NOREPLACE: Final = 0x100022  # with PRIVATE | ANONYMOUS
TRAP_SIGNALS: Final = (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD)  # ignored by default


class ProcessGone(OSError):
    """The process ended while the engine held it."""

    def __init__(self, pid: int) -> None:
        super().__init__(3, f"process {pid} has ended")


def _own_vdso() -> tuple[int, int]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            first, last = line.split(" ", 1)[0].split("-")
            return int(first, 16), int(last, 16)
    raise OSError(38, "this kernel maps no vDSO")


def _vdso_image() -> bytes:
    first, last = _own_vdso()
    return ctypes.string_at(first, last - first)


VDSO_IMAGE: Final = _vdso_image()
_GATE_ROOM: Final = 256
# The vDSO is a page-padded ELF image; its tail is zeros (the two supported kernels have 1.4 KB and more).
GATE_OFFSET: Final = (len(VDSO_IMAGE.rstrip(b"\0")) + 64 + 15) & ~15
if len(VDSO_IMAGE) < GATE_OFFSET + _GATE_ROOM:
    raise OSError(38, "the vDSO of this kernel has no free tail for the gate")


def row(number: int, *arguments: int, must: bool = True) -> bytes:
    """One row of a call table."""
    padded = arguments + _NONE[len(arguments) :]
    try:
        return _pack_row(number, must, *padded, _UNMADE)
    except struct.error:  # a negative argument
        return _pack_row(number, must, *[a & ALL_SIGNALS for a in padded], _UNMADE)


class Injection:
    """The way into one stopped thread of a process; `registers` and `mask` are what it will go on with.

    Attributes:
        pid: process (host pid); memory is written under this id.
        tid: the thread that makes the calls.
        registers, mask: state that the thread gets back on `finish`, and by itself should the tracer die.
        base: scratch mapping, 0 before `enter`.
        stopped_by: a SIGSTOP that arrived meanwhile and still has to be delivered.
    """

    def __init__(self, pid: int, tid: int, memory: int, vdso: int, registers: Registers, mask: int, trap: int) -> None:
        self.pid, self.tid, self.memory, self.vdso = pid, tid, memory, vdso
        self.registers, self.mask, self.trap = registers, mask, trap
        self.base = 0
        self._slot = _SLOT
        self.stopped_by = 0
        self.others: list[int] = []  # threads that an exec is going to kill and that we have to reap for it
        self.while_waiting: Callable[[], object] | None = None  # called every now and then in a long wait
        self.on_event: Callable[[], object] | None = None  # called at a fork or clone event
        self._heal: list[bytes] = []

    def call(self, name: str, *arguments: int, subject: str = "") -> int:
        """One system call through the gate (execve only without a trap). Returns its result; raises OSError."""
        result = self.call_raw(NR[name], *arguments)
        if is_error(result):
            raise OSError(-result, os.strerror(-result), subject or f"{name} in process {self.pid}")
        return result

    def call_raw(self, number: int, *arguments: int, interrupt: bool = False) -> int:
        """One call through the gate; its raw result.

        Args:
            interrupt: make the call find an interruption as soon as it would sleep (it then arms its restart block).
        """
        gate = self.vdso + GATE_OFFSET
        trap = 0 if interrupt else self.trap
        process_vm.force_write(self.memory, gate, x86_64.gate_code(gate, self.registers, self.mask, trap))
        go = self._entry(gate)
        go.set_call(number, arguments)
        # In this order: dead between the two, the thread runs the gate with signals open, which harms nobody.
        ptrace.set_registers(self.tid, go)
        ptrace.set_mask(self.tid, ALL_SIGNALS & ~(1 << (trap - 1)) if trap else ALL_SIGNALS)
        if trap:
            while True:
                self._run(ptrace.CONT, trap)
                now = ptrace.get_registers(self.tid)
                if now.pc > gate:  # else it is one that somebody else sent, and that it ignores
                    return now.gate_result
        self._run(ptrace.SYSCALL, _SYSGOOD)
        if interrupt:
            ptrace.interrupt(self.tid)
        self._run(ptrace.SYSCALL, _SYSGOOD)
        return ptrace.get_registers(self.tid).result

    def enter(self, base: int) -> None:
        """Map the scratch at `base` (a hole) and put the runner there. Raises OSError."""
        if self.base:
            return
        try:
            self.call(
                "mmap", base, SCRATCH_SIZE, _PROT_RWX, _MAP_FIXED_NOREPLACE, -1 & ALL_SIGNALS, 0,
                subject="scratch memory",
            )  # fmt: skip
        except PermissionError:
            why = "PR_SET_MDWE, or a security module"
            raise OSError(95, f"it may have no memory that is both written and executed ({why})") from None
        self.adopt(base)

    def adopt(self, base: int) -> None:
        """Use a scratch mapping that is there already."""
        self.base = base
        process_vm.write(self.pid, base, CODE_BYTES)
        self.write_slot()

    def for_thread(self, tid: int, registers: Registers, mask: int, trap: int = 0) -> "Injection":
        """The way into another thread of the process, for use while this one stands still.

        One at a time: before the next, that thread has to be given registers that need no slot (`finish`, `park`).

        Args:
            trap: as `choose_trap`; 0 is always right, and slow.
        """
        other = Injection(self.pid, tid, self.memory, self.vdso, registers, mask, trap)
        other.base, other._slot = self.base, _SECOND_SLOT
        other.write_slot()
        return other

    def park(self) -> None:
        """Leave the thread where it ends by itself, should the tracer die before `finish`."""
        ptrace.set_registers(self.tid, self._entry(self.base + _PARKED))

    def set_heal(self, rows: list[bytes]) -> None:
        """Calls that an abandoned process makes before it goes on (it may exec or exit instead)."""
        self._heal = rows
        self.write_slot()

    def write_slot(self) -> None:
        """Write the state to go back to; call it after a change of registers, mask or trap."""
        if self.base:
            slot = self.base + self._slot
            data = x86_64.slot(self.registers, self.mask, self.trap, slot, self.base + _HEAL, len(self._heal))
            heal = data.ljust(_HEAL - _SLOT, b"\0") + b"".join(self._heal) if self._slot == _SLOT else data
            process_vm.write(self.pid, slot, heal)

    def start_table(self, table: int, count: int) -> None:
        """Point the thread at a table and let it run (no wait)."""
        go = self._entry(self.base)
        go.run_table(table, count, self.base + self._slot)
        ptrace.set_registers(self.tid, go)
        ptrace.set_mask(self.tid, ALL_SIGNALS & ~(1 << (self.trap - 1)) if self.trap else ALL_SIGNALS)

    def run_table(self, table: int, count: int) -> None:
        """Run rows that are in place already, to the stop after the last (or after a row that must not fail)."""
        self.start_table(table, count)
        self._to_trap()

    def go_on(self) -> None:
        """Go on with a table in the midst of which the thread has stopped."""
        self._to_trap()

    def run_to_exec(self) -> bool:
        """Continue a started table to the stop of PTRACE_EVENT_EXEC (True) or to its end (False)."""
        reached: list[bool] = []
        self.on_event = lambda: reached.append(True)
        try:
            self._to_trap(stop_at_event=True)
        finally:
            self.on_event = None
        return bool(reached)

    def leave(self) -> None:
        """Unmap the scratch."""
        if self.base:
            base, self.base = self.base, 0
            self.call("munmap", base, SCRATCH_SIZE)

    def finish(self) -> None:
        """Give the thread its mask and registers; it is still stopped, the next thing is a detach.

        The registers may hold an interrupted call (orig_rax, -ERESTART…): the kernel deals with it on the way out,
        since a detach
        always makes the thread look for signals.
        """
        ptrace.set_mask(self.tid, self.mask)
        ptrace.set_registers(self.tid, self.registers)

    def _wait_reaping(self) -> int:
        while True:
            status = ptrace.wait_nohang(self.tid)
            if status is not None:
                return status
            if self.while_waiting is not None:
                with contextlib.suppress(OSError):  # of a process that is in the middle of an exec, or ends
                    self.while_waiting()
            for tid in list(self.others):
                ended = ptrace.wait_nohang(tid)
                if ended is not None and not os.WIFSTOPPED(ended):
                    self.others.remove(tid)
            time.sleep(0.0001)

    def _entry(self, at: int) -> Registers:
        go = self.registers.copy()
        go.pc, go.call = at, -1
        return go

    def _to_trap(self, stop_at_event: bool = False) -> None:
        if self.trap:
            self._run(ptrace.CONT, self.trap, stop_at_event)
            return
        # No signal is free for the trap: stop at each call instead. Signal 0 makes the trap's tgkill a call without
        # effect.
        while not self._run(ptrace.SYSCALL, _SYSGOOD, stop_at_event):
            registers = ptrace.get_registers(self.tid)
            last = registers.call == NR["tgkill"]
            if last:
                registers.call = -1
                ptrace.set_registers(self.tid, registers)
            if self._run(ptrace.SYSCALL, _SYSGOOD, stop_at_event) or last:
                return

    def _run(self, request: int, expected: int, stop_at_event: bool = False) -> bool:
        """Continue to the expected stop; True when it is an event instead."""
        while True:
            ptrace.ptrace(request, self.tid)
            polls = self.others or self.while_waiting is not None
            status = self._wait_reaping() if polls else ptrace.wait(self.tid)
            if not os.WIFSTOPPED(status):
                raise ProcessGone(self.pid)
            stop = status >> 8
            if stop == expected:
                return False
            if stop & 0xFF == signal.SIGSTOP and stop >> 8 == 0:
                self.stopped_by = signal.SIGSTOP  # not maskable; delivered after the release
            elif stop >> 8 and stop >> 8 != ptrace.EVENT_STOP and self.on_event is not None:
                self.on_event()
                if stop_at_event:
                    return True
            elif stop >> 8 != ptrace.EVENT_STOP:
                raise OSError(5, f"process {self.pid} stopped unexpectedly (status {status:#x})")


class Calls:
    """A batch of calls with their data, run by an Injection in one stop (or few, when it is long).

    Data addresses are handed out at once, so that rows may refer to them. Everything is written in one go.
    """

    def __init__(self, injection: Injection) -> None:
        self._injection = injection
        self._rows: list[bytes] = []
        self._labels: list[str] = []
        self._data = bytearray()
        self.results: list[int] = []

    def add(self, name: str | int, *arguments: int, must: bool = True, label: str = "") -> int:
        """Append a call; returns its index in `results`. `label` names the matter in an error's text."""
        number = NR[name] if isinstance(name, str) else name
        self._rows.append(row(number, *arguments, must=must))
        self._labels.append(label or str(name))
        return len(self._rows) - 1

    def data(self, content: bytes) -> int:
        """Address at which the process will find `content` (8-byte aligned)."""
        address = self._injection.base + _DATA + len(self._data)
        self._data += content
        self._data += b"\0" * (-len(self._data) % 8)
        if len(self._data) > HEAL_STRINGS - _DATA:
            raise OSError(7, "too much data for one batch of calls")
        return address

    def room(self) -> int:
        """Bytes of data that still fit."""
        return HEAL_STRINGS - _DATA - len(self._data)

    def make_ready(self) -> None:
        """Write what `run_until_exec` will run; nothing runs yet."""
        self._write_data()
        self._write_rows(self._last_part())

    def run_until_exec(self) -> None:
        """Run a batch that is ready and whose last call is an exec, to the exec's event stop.

        Raises:
            OSError: a call failed; the process is still the old one.
        """
        last = self._last_part()
        for first in range(0, last, MAX_ROWS):
            self._run_part(first)
        if last:
            self._write_rows(last)
        self._injection.start_table(self._injection.base + _TABLE, len(self._rows) - last)
        while not self._injection.run_to_exec():
            if self._take_results(last):
                return

    def _last_part(self) -> int:
        return (len(self._rows) - 1) // MAX_ROWS * MAX_ROWS

    def reserve_block(self) -> int:
        """Address of a struct msghdr for receiving descriptors."""
        address = self.data(bytes(scm.RECEIVE_SIZE))
        start = address - self._injection.base - _DATA
        self._data[start : start + scm.RECEIVE_SIZE] = scm.receive_block(address).ljust(scm.RECEIVE_SIZE, b"\0")
        return address

    def read(self, address: int, length: int) -> bytes:
        """What the calls left at a data address."""
        return process_vm.read(self._injection.pid, address, length)

    def run(self) -> list[int]:
        """Run all; returns the raw results. Raises OSError naming the first call that failed and must not."""
        self._write_data()
        for first in range(0, len(self._rows), MAX_ROWS):
            self._run_part(first)
        return self.results

    def _write_data(self) -> None:
        if self._data:
            process_vm.write(self._injection.pid, self._injection.base + _DATA, bytes(self._data))

    def _write_rows(self, first: int) -> None:
        rows = b"".join(self._rows[first : first + MAX_ROWS])
        process_vm.write(self._injection.pid, self._injection.base + _TABLE, rows)

    def _run_part(self, first: int) -> None:
        self._write_rows(first)
        self._injection.run_table(self._injection.base + _TABLE, min(len(self._rows) - first, MAX_ROWS))
        while not self._take_results(first):
            self._injection.go_on()

    def _take_results(self, first: int) -> bool:
        """Whether the rows have been made: else the thread stands at a signal like ours that somebody else sent."""
        inj, count = self._injection, min(len(self._rows) - first, MAX_ROWS)
        raw = process_vm.read(inj.pid, inj.base + _TABLE, count * _ROW)
        self.results += [result for (result,) in _RESULT.iter_unpack(raw)]
        for i, result in enumerate(self.results[first:], first):
            if is_error(result) and self._rows[i][4]:
                raise OSError(-result, f"{self._labels[i]}: {error_text(result)}")
            if result == _UNMADE:
                del self.results[first:]
                return False
        return True
