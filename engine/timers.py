"""POSIX timers of a rebuilt process, under their own numbers (timer_create(2)).

Programs keep a timer's number. Since Linux 6.15 a process may choose it (PR_TIMER_CREATE_RESTORE_IDS); before, the
kernel counts up over all the timers that a process ever made, so that a fresh one gets to any number by making and
deleting timers. One that has counted past it already, as a ghost may have, cannot have it.
"""

import errno
import struct
from typing import Any, Final

from engine import state
from engine.image import Image
from engine.linux.libc import is_error
from engine.runner import Calls, Injection

_EVENT_SIZE: Final = 64  # bytes of struct sigevent
_NONE: Final = 1  # SIGEV_NONE
_CLOCK_MONOTONIC: Final = 1
_BATCH: Final = 400  # timers made and deleted in one batch of calls
_FARTHEST: Final = 1 << 20  # numbers counted up at most: a second


def restore(injection: Injection, image: Image) -> None:
    """Make and set them. The threads that they signal must be there. Raises OSError."""
    if not image.timers:
        return
    can_choose = _choosing(injection, 1)
    for timer in sorted(image.timers):
        number = int(timer[0])
        made = _create(injection, timer)
        if made != number and not can_choose:
            _count_up(injection, made, number)
            made = _create(injection, timer)
        if made != number:
            raise _cannot(number)
        calls = Calls(injection)
        calls.add("timer_settime", number, 0, calls.data(timer[6]), 0, label=f"timer {number}")
        calls.run()
    if can_choose:
        _choosing(injection, 0)


def _choosing(injection: Injection, on: int) -> bool:
    calls = Calls(injection)
    calls.add("prctl", state.PR_TIMER_CREATE_RESTORE_IDS, on, 0, 0, 0, must=False)
    return not is_error(calls.run()[0])


def _create(injection: Injection, timer: list[Any]) -> int:
    number, notify, signal, value, tid, clock = timer[:6]
    calls = Calls(injection)
    event = struct.pack("<Qiii", value, signal, notify, tid).ljust(_EVENT_SIZE, b"\0")
    where = calls.data(struct.pack("<i", number))
    calls.add("timer_create", clock, calls.data(event), where, label=f"timer {number}")
    calls.run()
    return int.from_bytes(calls.read(where, 4), "little")


def _count_up(injection: Injection, made: int, wanted: int) -> None:
    """Delete the timer `made`, and have the kernel's next number be `wanted`. Raises OSError."""
    if made > wanted or wanted - made > _FARTHEST:
        raise _cannot(wanted)
    numbers = range(made + 1, wanted)
    for first in range(0, max(len(numbers), 1), _BATCH):
        calls = Calls(injection)
        if not first:
            calls.add("timer_delete", made)
        event = calls.data(struct.pack("<Qiii", 0, 0, _NONE, 0).ljust(_EVENT_SIZE, b"\0"))
        where = calls.data(bytes(4))
        for number in numbers[first : first + _BATCH]:
            calls.add("timer_create", _CLOCK_MONOTONIC, event, where)
            calls.add("timer_delete", number, label=f"timer {number}")
        calls.run()


def _cannot(number: int) -> OSError:
    return OSError(errno.EBUSY, f"timer {number} cannot have its number under this kernel")
