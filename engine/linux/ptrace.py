"""<linux/ptrace.h>, ptrace(2): seize, stop, registers, masks, queued signals."""

import ctypes
import os
import signal
import time
from typing import Final

from engine.linux.libc import LIBC
from engine.linux.x86_64 import EXTENDED_MAX, NOTE_EXTENDED, Registers

CONT: Final = 7
KILL: Final = 8
DETACH: Final = 17
SYSCALL: Final = 24
PEEKUSER: Final = 3
GETREGS: Final = 12
SETREGS: Final = 13
SETOPTIONS: Final = 0x4200
GETEVENTMSG: Final = 0x4201
GETSIGINFO: Final = 0x4202
GETREGSET: Final = 0x4204
SETREGSET: Final = 0x4205
SEIZE: Final = 0x4206
INTERRUPT: Final = 0x4207
LISTEN: Final = 0x4208
PEEKSIGINFO: Final = 0x4209
GETSIGMASK: Final = 0x420A
SETSIGMASK: Final = 0x420B
SECCOMP_GET_FILTER: Final = 0x420C
GET_RSEQ_CONFIGURATION: Final = 0x420F
GET_DISPATCH: Final = 0x4211  # PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, Linux 6.4

O_TRACESYSGOOD: Final = 0x1
O_TRACEFORK: Final = 0x2
O_TRACEVFORK: Final = 0x4
O_TRACECLONE: Final = 0x8
O_TRACEEXEC: Final = 0x10
O_EXITKILL: Final = 0x100000

EVENT_CLONE: Final = 3
EVENT_EXEC: Final = 4
EVENT_STOP: Final = 128

WALL: Final = 0x40000000

_ptrace = LIBC.ptrace
_ptrace.argtypes = [ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_void_p]
_ptrace.restype = ctypes.c_long


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _Peek(ctypes.Structure):
    _fields_ = [("off", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("nr", ctypes.c_int32)]


def ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    """One raw request. Raises OSError (ESRCH: gone or not stopped; EPERM: may not, or traced by another)."""
    result: int = _ptrace(request, tid, address, data)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"process {tid}")
    return result


def seize(tid: int, options: int) -> None:
    """PTRACE_SEIZE: attach without stopping."""
    ptrace(SEIZE, tid, 0, options)


def interrupt(tid: int) -> None:
    """PTRACE_INTERRUPT: ask for an event stop (returns before it comes)."""
    ptrace(INTERRUPT, tid)


def detach(tid: int, signal: int = 0) -> None:
    """PTRACE_DETACH: let it run, with `signal` delivered when the stop is a signal's."""
    ptrace(DETACH, tid, 0, signal)


def get_registers(tid: int) -> Registers:
    """General registers of a stopped thread."""
    registers = Registers()
    ptrace(GETREGS, tid, 0, ctypes.addressof(registers))
    return registers


def set_registers(tid: int, registers: Registers) -> None:
    """Set the general registers of a stopped thread."""
    ptrace(SETREGS, tid, 0, ctypes.addressof(registers))


_xstate_buffer = ctypes.create_string_buffer(EXTENDED_MAX)


def get_xstate(tid: int) -> bytes:
    """FP, SSE, AVX, AVX-512, PKRU, AMX…: the whole XSAVE area in standard format."""
    vector = _Iovec(ctypes.addressof(_xstate_buffer), EXTENDED_MAX)
    ptrace(GETREGSET, tid, NOTE_EXTENDED, ctypes.addressof(vector))
    return _xstate_buffer.raw[: vector.length]


def set_xstate(tid: int, state: bytes) -> None:
    """The inverse of `get_xstate`."""
    buffer = ctypes.create_string_buffer(state, len(state))
    vector = _Iovec(ctypes.addressof(buffer), len(state))
    ptrace(SETREGSET, tid, NOTE_EXTENDED, ctypes.addressof(vector))


def get_mask(tid: int) -> int:
    """Blocked signals as the kernel's 64-bit set."""
    value = ctypes.c_uint64()
    ptrace(GETSIGMASK, tid, 8, ctypes.addressof(value))
    return value.value


def set_mask(tid: int, mask: int) -> None:
    """Set the blocked signals."""
    value = ctypes.c_uint64(mask)
    ptrace(SETSIGMASK, tid, 8, ctypes.addressof(value))


def event_message(tid: int) -> int:
    """PTRACE_GETEVENTMSG: the new thread's id after a clone event."""
    value = ctypes.c_ulong()
    ptrace(GETEVENTMSG, tid, 0, ctypes.addressof(value))
    return value.value


SIGINFO_SIZE: Final = 128
_PEEK_BATCH: Final = 32


def queued_signals(tid: int, shared: bool) -> list[bytes]:
    """Every siginfo_t (128 bytes) in the thread's queue, or in the process's when `shared`, first come first."""
    found: list[bytes] = []
    buffer = ctypes.create_string_buffer(SIGINFO_SIZE * _PEEK_BATCH)
    while True:
        request = _Peek(len(found), 1 if shared else 0, _PEEK_BATCH)
        count = ptrace(PEEKSIGINFO, tid, ctypes.addressof(request), ctypes.addressof(buffer))
        raw = buffer.raw
        found += [raw[i * SIGINFO_SIZE : (i + 1) * SIGINFO_SIZE] for i in range(count)]
        if count < _PEEK_BATCH:
            return found


def rseq_configuration(tid: int) -> tuple[int, int, int, int]:
    """(pointer, size, signature, flags) of the thread's restartable-sequence area; pointer 0: none registered."""
    buffer = (ctypes.c_uint32 * 6)()
    try:
        ptrace(GET_RSEQ_CONFIGURATION, tid, 24, ctypes.addressof(buffer))
    except OSError as error:
        if error.errno == 22 or error.errno == 5:  # a kernel built without rseq
            return 0, 0, 0, 0
        raise
    return buffer[0] | buffer[1] << 32, buffer[2], buffer[3], buffer[4]


def has_dispatch(tid: int) -> bool:
    """Whether calls of a stopped thread are dispatched to itself; False where the kernel does not tell."""
    config = (ctypes.c_uint64 * 4)()  # struct ptrace_sud_config: mode, selector, offset, len
    try:
        ptrace(GET_DISPATCH, tid, 32, ctypes.addressof(config))
    except OSError as error:
        if error.errno in (22, 5):
            return False
        raise
    return bool(config[0])


_WAIT_TIMEOUT_S: Final = 20.0  # injected calls take microseconds; a loaded machine may need longer
# To sleep and be woken takes longer than most stops do: look again and again for that long first.
_SPIN_NS: Final = 150_000


def wait(tid: int) -> int:
    """Wait for the next stop or end of one tracee; returns the raw wait status.

    Where SIGCHLD is blocked (as in a worker), the wait is bounded.

    Raises:
        ChildProcessError: it is none of ours.
        TimeoutError: nothing happened.
    """
    end = time.monotonic_ns() + _SPIN_NS
    while time.monotonic_ns() < end:
        pid, status = os.waitpid(tid, WALL | os.WNOHANG)
        if pid:
            return status
        os.sched_yield()  # it may be waiting for this very CPU
    if signal.SIGCHLD not in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        return os.waitpid(tid, WALL)[1]
    while True:
        pid, status = os.waitpid(tid, WALL | os.WNOHANG)
        if pid:
            return status
        # A SIGCHLD that came before the look is pending and ends this at once.
        if signal.sigtimedwait((signal.SIGCHLD,), _WAIT_TIMEOUT_S) is None:
            raise TimeoutError(110, f"process {tid} does not come back from a call made in it")


def wait_nohang(tid: int) -> int | None:
    """As `wait`, None when nothing has happened."""
    pid, status = os.waitpid(tid, WALL | os.WNOHANG)
    return status if pid else None


_ENDS: Final = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)


def reap(tid: int) -> None:
    """Take notice of the end of a tracee, if it has ended. Raises ChildProcessError when it is none of ours (any more).

    A wait for ends takes a tracee's stop as well, asked or not (kernel/exit.c, wait_task_stopped): so look first.
    """
    flags = os.WEXITED | os.WNOHANG | WALL
    seen = os.waitid(os.P_PID, tid, flags | os.WNOWAIT)
    if seen is not None and seen.si_code in _ENDS:
        os.waitid(os.P_PID, tid, flags)


def is_event(status: int, event: int) -> bool:
    """Whether a wait status is the stop of a ptrace event."""
    return os.WIFSTOPPED(status) and status >> 16 == event


def seccomp_filter(tid: int) -> bytes:
    """A stopped thread's last filter (seccomp(2)). Raises OSError: it has none, or the kernel does not tell."""
    count = ptrace(SECCOMP_GET_FILTER, tid, 0, 0)
    buffer = ctypes.create_string_buffer(count * 8)  # struct sock_filter
    ptrace(SECCOMP_GET_FILTER, tid, 0, ctypes.addressof(buffer))
    return buffer.raw
