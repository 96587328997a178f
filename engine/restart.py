"""System calls that the freeze interrupted: a sleeping process sleeps out its time and sees no EINTR.

What the kernel leaves as the call's result at the stop decides (include/linux/errno.h):

* -512 ERESTARTSYS, -513, -514 ERESTARTNOHAND: the same call again. select and ppoll keep the rest of their time in
user memory.
* -516 ERESTART_RESTARTBLOCK (nanosleep, relative futex waits, poll): the kernel keeps an absolute deadline for
restart_syscall,
  which does not travel; the destination *primes* its own: it makes the call with the remaining time and has it
  interrupted.
* -4 EINTR (epoll_wait, sigtimedwait and others of signal(7), "Interruption by stop signals"): the kernel gives the
call up even
  for a mere stop. Unless a signal with a handler waits, the call is made again with the remaining time.

The remaining time comes from where the call leaves it (rem of nanosleep), else from the moment the thread went to
sleep:
se.exec_start of /proc/PID/task/TID/sched, read before the freeze, error below 0.3 ms.
"""

import os
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from engine.linux import process_vm, procfs
from engine.linux.x86_64 import ERESTART_RESTARTBLOCK, ERESTARTNOHAND, NR, Registers

if TYPE_CHECKING:
    from engine.freeze import Frozen, Thread
    from engine.runner import Injection

_EINTR: Final = -4
_POLL, _NANOSLEEP, _FUTEX, _CLOCK_NANOSLEEP = (NR[name] for name in ("poll", "nanosleep", "futex", "clock_nanosleep"))
_EPOLL_WAIT, _EPOLL_PWAIT, _EPOLL_PWAIT2 = (NR[name] for name in ("epoll_wait", "epoll_pwait", "epoll_pwait2"))
_SIGTIMEDWAIT: Final = NR["rt_sigtimedwait"]
_IN_MEMORY: Final = (_EPOLL_PWAIT2, _SIGTIMEDWAIT)  # their time is a timespec
_SELECT, _PSELECT6, _PPOLL = (NR[name] for name in ("select", "pselect6", "ppoll"))
# Given up with EINTR at a stop, without a time of their own or with one that starts anew; read is that of inotify.
_AGAIN: Final = frozenset(
    NR[name]
    for name in (
        "read", "accept", "recvfrom", "recvmsg", "semop", "msgsnd", "msgrcv", "io_getevents", "semtimedop", "accept4",
        "recvmmsg", "io_pgetevents",
    )
)  # fmt: skip
_TIMED: Final = frozenset(
    (
        _POLL, _NANOSLEEP, _FUTEX, _CLOCK_NANOSLEEP, _EPOLL_WAIT, _EPOLL_PWAIT, _EPOLL_PWAIT2, _SIGTIMEDWAIT,
        NR["restart_syscall"],
    )
)  # fmt: skip
_TIME_IN: Final = {_NANOSLEEP: 0, _CLOCK_NANOSLEEP: 2, _FUTEX: 3}  # argument of calls with a restart block
# Of futex operations with a time only FUTEX_WAIT, 0, counts from now (futex(2)).
_FUTEX_COMMAND: Final = 0x7F
_NS: Final = 1_000_000_000
# Below the red zone and what a nested frame is likely to use first; read once, when the call is made again.
_BELOW_STACK: Final = 512


@dataclass(slots=True)
class Sleep:
    """What a thread slept in before the freeze: call number, and when (time.monotonic) it went to sleep."""

    number: int
    started: float


def look_at_sleep(pid: int, tid: int) -> Sleep | None:
    """Before the freeze: is the thread in a timed wait, and since when? Raises FileNotFoundError,
    ProcessLookupError.
    """
    directory = f"/proc/{pid}/task/{tid}"
    words = procfs.read(f"{directory}/syscall").split()
    if len(words) < 2 or not words[0].isdigit() or int(words[0]) not in _TIMED:
        return None
    number = int(words[0])
    if number == NR["restart_syscall"]:
        number = _restarted_call(procfs.read(f"{directory}/wchan"), int(words[1], 16))
    started = _exec_start(f"{directory}/sched")
    now, clock = _scheduler_clock(procfs.parse_stat(procfs.read(f"{directory}/stat")).processor)
    return Sleep(number, now - max(clock - started, 0.0) if started and clock else now)


def _scheduler_clock(processor: int) -> tuple[float, float | None]:
    """(time.monotonic(), the scheduler's clock on a CPU): each CPU has its own, which leaves out stolen time."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {processor})
        os.sched_yield()  # brings our own figure up to date
        return time.monotonic(), _exec_start("/proc/thread-self/sched")
    except OSError:  # that CPU is not ours to use
        return time.monotonic(), None
    finally:
        os.sched_setaffinity(0, before)


def _restarted_call(place: bytes, first: int) -> int:
    """Which call goes on as restart_syscall: only these four have one. Its arguments are still in the registers."""
    if b"futex" in place:
        return _FUTEX
    if b"poll" in place:
        return _POLL
    # nanosleep's restart is a tail call that leaves no name of its own. Its first argument is a pointer, the other's a
    # clock.
    return _CLOCK_NANOSLEEP if first < 4096 else _NANOSLEEP


def _exec_start(path: str) -> float | None:
    # "se.exec_start                                :         51453.166371": ms of the scheduler's clock
    _, found, rest = procfs.read(path).partition(b"se.exec_start")
    return float(rest.split(b"\n", 1)[0].split(b":")[1]) / 1000 if found else None


def adjust(frozen: "Frozen", thread: "Thread") -> None:
    """At the stop: have an interrupted call that the kernel gave up made again, with what is left of its time."""
    r = thread.registers
    number, result = r.call, r.result
    if number < 0:
        return
    if number == _POLL and result == ERESTART_RESTARTBLOCK:
        # As a fresh call rather than as restart_syscall: so its time is known should it be frozen again.
        r.repeat(number)
        thread.again = number
        r.set_argument(2, _milliseconds(r.argument(2), thread, frozen))
    elif result == ERESTART_RESTARTBLOCK and _is_absolute_futex(thread, number):
        r.repeat(_FUTEX)
    elif result != _EINTR or _handler_due(frozen, thread):
        return
    elif number in (_EPOLL_WAIT, _EPOLL_PWAIT):
        r.repeat(number)
        thread.again = number
        r.set_argument(3, _milliseconds(r.argument(3), thread, frozen))
    elif number == _EPOLL_PWAIT2:
        r.repeat(number)
        thread.again = number
        r.set_argument(3, _moved_timespec(r.argument(3), r, thread, frozen))
    elif number == _SIGTIMEDWAIT:
        r.repeat(number)
        thread.again = number
        r.set_argument(2, _moved_timespec(r.argument(2), r, thread, frozen))
    elif number in _AGAIN:
        r.repeat(number)


def _is_absolute_futex(thread: "Thread", number: int) -> bool:
    if number == NR["restart_syscall"] and thread.sleep:
        number = thread.sleep.number
    return number == _FUTEX and thread.registers.argument(1) & _FUTEX_COMMAND != 0


def _handler_due(frozen: "Frozen", thread: "Thread") -> bool:
    status = frozen.status_of(thread)
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return bool(pending & ~thread.mask & int(status["SigCgt"], 16))


def _elapsed(thread: "Thread", frozen: "Frozen") -> float:
    return max(frozen.settled - thread.sleep.started, 0.0) if thread.sleep else 0.0


def _milliseconds(timeout: int, thread: "Thread", frozen: "Frozen") -> int:
    return _less(timeout, _elapsed(thread, frozen))


def _less(timeout: int, elapsed: float) -> int:
    """A timeout of milliseconds in the lower half of a register, shortened unless it is none (-1) or zero."""
    value = (timeout & 0xFFFFFFFF) - ((timeout & 0x80000000) << 1)
    return max(round(value - elapsed * 1000), 0) if value > 0 else timeout


def _moved_timespec(pointer: int, r: Registers, thread: "Thread", frozen: "Frozen") -> int:
    if not pointer:
        return 0
    remaining = _timespec(frozen.pid, pointer) - round(_elapsed(thread, frozen) * _NS)
    place = (r.stack - _BELOW_STACK) & ~15
    process_vm.write(frozen.pid, place, _pack(max(remaining, 0)))
    return place


def _timespec(pid: int, pointer: int) -> int:
    seconds, nanoseconds = struct.unpack("<qq", process_vm.read(pid, pointer, 16))
    return int(seconds) * _NS + int(nanoseconds)


def _pack(nanoseconds: int) -> bytes:
    return struct.pack("<qq", *divmod(nanoseconds, _NS))


def prime_of(frozen: "Frozen", thread: "Thread", r: Registers) -> list[int]:
    """For the image: [call number, remaining ns] of a call that goes on by a restart block; empty for none.

    Of one that is made again with milliseconds in a register: [call number, -1]; with a time in memory: [call number,
    -2, address].
    A call that cannot be told becomes an EINTR in the registers.
    """
    if pointer := _rest_in_memory(thread, r):
        return [thread.again or r.call, -2, pointer]
    if thread.again:
        return [] if thread.again in _IN_MEMORY else [thread.again, -1]
    if r.call < 0 or r.result != ERESTART_RESTARTBLOCK:
        return []
    number = r.call
    if number == NR["restart_syscall"]:
        number = thread.sleep.number if thread.sleep else 0
    passed = round(_elapsed(thread, frozen) * _NS)
    rem = {_NANOSLEEP: r.argument(1), _CLOCK_NANOSLEEP: r.argument(3)}.get(number, 0)
    if rem:
        return [number, max(_timespec(frozen.pid, rem), 0)]
    pointer = r.argument(_TIME_IN[number]) if number in _TIME_IN else 0
    if pointer:
        return [number, max(_timespec(frozen.pid, pointer) - passed, 0)]
    r.result = _EINTR
    return []


def _rest_in_memory(thread: "Thread", r: Registers) -> int:
    """Address of the time of a call that will be made again as it is; 0 for none."""
    if thread.again in _IN_MEMORY:
        return r.argument(3 if thread.again == _EPOLL_PWAIT2 else 2)
    if r.result != ERESTARTNOHAND or r.call < 0:
        return 0
    return {_SELECT: r.argument(4), _PSELECT6: r.argument(4), _PPOLL: r.argument(2)}.get(r.call, 0)


def _shorten(pid: int, address: int, elapsed: float, unit: int) -> None:
    """Take the frozen time off a timespec (unit 1 ns) or timeval (1000 ns)."""
    seconds, part = struct.unpack("<qq", process_vm.read(pid, address, 16))
    seconds, left = divmod(max(seconds * _NS + part * unit - round(elapsed * _NS), 0), _NS)
    process_vm.write(pid, address, struct.pack("<qq", seconds, left // unit))


def prime(injection: "Injection", plan: list[int], elapsed: float, scratch: int) -> None:
    """At the destination: arm this kernel's restart block for the thread's sleep.

    Args:
        plan: of `prime_of`.
        elapsed: seconds since the process was frozen.
        scratch: address of 16 bytes in the process for the remaining time.
    """
    number, remaining = plan[:2]
    if remaining == -2:
        _shorten(injection.pid, plan[2], elapsed, 1000 if number == _SELECT else 1)
        return
    if number in (_POLL, _EPOLL_WAIT, _EPOLL_PWAIT):
        index = 2 if number == _POLL else 3
        injection.registers.set_argument(index, _less(injection.registers.argument(index), elapsed))
        return
    process_vm.write(injection.pid, scratch, _pack(max(remaining - round(elapsed * _NS), 0)))
    r = injection.registers
    arguments = [r.argument(index) for index in range(6)]
    arguments[_TIME_IN[number]] = scratch
    result = injection.call_raw(number, *arguments, interrupt=True)
    # Anything but "interrupted" is what the call returns.
    r.result, r.call = result, number
