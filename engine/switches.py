"""What each thread has switched on or off for itself: prctl(2), arch_prctl(2).

The time stamp counter, the CPUID instruction, the CPU's speculation, and whether it writes back what others wait for.
Threads inherit them from who makes them.
"""

from collections.abc import Callable
from typing import Final

from engine.image import ImageError
from engine.runner import Calls

# <linux/prctl.h>, <asm/prctl.h>
_PR_GET_TSC: Final = 25
_PR_SET_TSC: Final = 26
_PR_GET_SPECULATION_CTRL: Final = 52
_PR_SET_SPECULATION_CTRL: Final = 53
_PR_SET_IO_FLUSHER: Final = 57
_ARCH_GET_CPUID: Final = 0x1011
_ARCH_SET_CPUID: Final = 0x1012
_TSC: Final = (1, 2)  # PR_TSC_ENABLE, PR_TSC_SIGSEGV
_BY_PRCTL: Final = 1  # PR_SPEC_PRCTL: it can be set; the other bits say what it is
_KINDS: Final = 3  # PR_SPEC_STORE_BYPASS, PR_SPEC_INDIRECT_BRANCH, PR_SPEC_L1D_FLUSH
_FLUSHES: Final = 0x00080000 | 0x00100000  # PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE of <linux/sched.h>

NORMAL: Final = [1, 1, 0, *[2] * _KINDS]
"""Time stamp counter, CPUID, I/O flusher, and PR_SPEC_ENABLE of each kind."""


def ask(calls: Calls, flags: int) -> Callable[[], list[int]]:
    """Add the questions; gives what reads the answers, once they have been made, in the order of `NORMAL`.

    Args:
        flags: of the thread, as /proc/PID/task/TID/stat has them.
    """
    place = calls.data(bytes(8))
    counter = calls.add("prctl", _PR_GET_TSC, place, must=False)
    cpuid = calls.add("arch_prctl", _ARCH_GET_CPUID, 0, must=False)
    kinds = [calls.add("prctl", _PR_GET_SPECULATION_CTRL, which, 0, 0, 0, must=False) for which in range(_KINDS)]

    def answers() -> list[int]:
        results = calls.results
        tsc = int.from_bytes(calls.read(place, 4), "little") if results[counter] == 0 else NORMAL[0]
        speculation = [results[index] for index in kinds]
        set_by_itself = [value & ~_BY_PRCTL if value > 0 and value & _BY_PRCTL else 2 for value in speculation]
        return [tsc, int(results[cpuid] != 0), int(flags & _FLUSHES == _FLUSHES), *set_by_itself]

    return answers


def rows(calls: Calls, wanted: list[int], had: list[int]) -> None:
    """Add the calls by which a thread that had these switches has those that are wanted."""
    tsc, cpuid, flushes, *speculation = wanted
    if tsc != had[0] and tsc in _TSC:
        calls.add("prctl", _PR_SET_TSC, tsc, label="time stamp counter")
    if cpuid != had[1]:
        calls.add("arch_prctl", _ARCH_SET_CPUID, cpuid, label="CPUID instruction")
    if flushes != had[2]:
        calls.add("prctl", _PR_SET_IO_FLUSHER, flushes, 0, 0, 0, label="I/O flusher")
    for which, (value, before) in enumerate(zip(speculation, had[3:], strict=True)):
        if value != before:  # a CPU that needs none of it cannot be told
            calls.add("prctl", _PR_SET_SPECULATION_CTRL, which, value, 0, 0, must=False)


def bounded(claimed: list[int]) -> list[int]:
    """What of these, which anybody may have written, an ordinary user may ask for. Raises ImageError."""
    if len(claimed) != len(NORMAL):
        raise ImageError("switches are missing")
    tsc, cpuid, _, *speculation = claimed
    return [tsc, cpuid, 0, *speculation]
