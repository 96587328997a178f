"""Rows that give a rebuilt process its signals, timers, names and rights."""

import struct
from typing import Any, Final, Protocol

from engine import state, switches
from engine.image import Image, ThreadState
from engine.runner import ALL_SIGNALS, Calls

_RSEQ_OLD: Final = 32  # bytes
_CAPABILITY_VERSION_3: Final = 0x20080522
_NO_SETUID_FIXUP: Final = 1 << 2
_CAP_LAST: Final = 63
_SS_ONSTACK: Final = 1
_UNQUEUEABLE: Final = (9, 19)
ACTION_NUMBERS: Final = [n for n in range(1, state.SIGNALS + 1) if n not in _UNQUEUEABLE]


class Rows(Protocol):
    """System calls that a process is going to make: `engine.runner.Calls`, or an order (engine/execorder.py)."""

    def data(self, content: bytes) -> Any:
        """Bytes that calls point to."""

    def add(self, call: str | int, *arguments: Any, must: bool = True, label: str = "") -> int:
        """Add one call."""


def process_rows(calls: Calls, image: Image) -> None:
    """The leader's own, umask, interval timers and the smaller settings."""
    leader = image.threads[0]
    thread_rows(calls, leader, switches.NORMAL)
    calls.add("umask", image.umask)
    calls.add("set_tid_address", leader.clear_tid)
    if image.subreaper:
        calls.add("prctl", state.PR_SET_CHILD_SUBREAPER, 1)
    if image.thp_disabled:
        calls.add("prctl", state.PR_SET_THP_DISABLE, 1, 0, 0, 0)
        if image.thp_disabled & ~1:  # but for what asks for them: Linux 6.18
            calls.add("prctl", state.PR_SET_THP_DISABLE, 1, image.thp_disabled & ~1, 0, 0, must=False)
    if image.machine_checks != state.MCE_DEFAULT:
        calls.add("prctl", state.PR_MCE_KILL, state.PR_MCE_KILL_SET, image.machine_checks, 0, 0, must=False)
    if image.memory_merge:
        calls.add("prctl", state.PR_SET_MEMORY_MERGE, 1, 0, 0, 0, must=False)
    for bit in range(image.barriers.bit_length()):
        if image.barriers >> bit & 1:
            calls.add("membarrier", 1 << bit, 0, 0, label="registering for membarrier")
    for which, value in enumerate(image.itimers):
        calls.add("setitimer", which, calls.data(_armed(value)), 0, label="interval timer")


def thread_rows(calls: Calls, one: ThreadState, had: list[int]) -> None:
    """A thread's name, switches, robust list, rseq and alternate stack.

    Args:
        had: its switches as it was made.
    """
    switches.rows(calls, one.switches, had)
    calls.add("prctl", state.PR_SET_NAME, calls.data(one.comm + b"\0"))
    calls.add("prctl", state.PR_SET_TIMERSLACK, one.timer_slack, must=False)
    if one.robust[0]:
        calls.add("set_robust_list", one.robust[0], one.robust[1], label="robust list")
    pointer, size, signature, _ = one.rseq
    if pointer:
        # Before Linux 6.3 the area has 32 bytes; a C library that knows more of them goes without.
        calls.add("rseq", pointer, size, 0, signature, must=size <= _RSEQ_OLD, label="rseq")
        if size > _RSEQ_OLD:
            calls.add("rseq", pointer, _RSEQ_OLD, 0, signature, must=False)  # no effect after the first
    pointer, flags, size = struct.unpack("<QixxxxQ", one.altstack)
    stack = struct.pack("<QiiQ", pointer, flags & ~_SS_ONSTACK, 0, size)
    calls.add("sigaltstack", calls.data(stack), 0, label="alternate stack")


def _armed(value: bytes) -> bytes:
    # One whose signal is pending stands at zero until the signal is taken; set like that, it would never go on.
    interval, left = value[:16], value[16:]
    return interval + interval if left == bytes(16) else value


def signal_rows(calls: Calls, image: Image, everything: bool) -> None:
    """Signal actions.

    Args:
        everything: set default actions too (the process was another program before).
    """
    numbers = ACTION_NUMBERS if everything else sorted(image.actions)
    for number in numbers:
        if number not in _UNQUEUEABLE:
            action = image.actions.get(number, bytes(state.ACTION_SIZE))
            calls.add("rt_sigaction", number, calls.data(action), 0, 8, label=f"action of signal {number}")


def credential_rows(calls: Rows, image: Image, leader: bool = True) -> None:
    """Ids, groups, capabilities: only ever downwards. Then what a change of ids resets: dumpable, death signal.

    Args:
        leader: False for the other threads, whose death signal is not known.
    """
    c: dict[str, Any] = image.credentials
    prctl = "prctl"
    for bit in range(_CAP_LAST):
        if not c["bounding"] >> bit & 1:
            calls.add(prctl, state.PR_CAPBSET_DROP, bit, must=False)
    calls.add("setgroups", len(c["groups"]), calls.data(struct.pack(f"<{len(c['groups'])}I", *c["groups"])), must=False)
    calls.add(prctl, state.PR_SET_SECUREBITS, image.securebits | _NO_SETUID_FIXUP, must=False)
    calls.add("setresgid", *c["gids"][:3], label="group ids")
    calls.add("setresuid", *c["uids"][:3], label="user ids")
    calls.add("setfsgid", c["gids"][3])
    calls.add("setfsuid", c["uids"][3])
    header = calls.data(struct.pack("<Ii", _CAPABILITY_VERSION_3, 0))
    if c["ambient"]:
        calls.add(
            "capset",
            header,
            calls.data(_sets(c["effective"] | 1 << 8, c["permitted"] | 1 << 8, c["inheritable"])),
            must=False,
        )
        for bit in range(_CAP_LAST):
            if c["ambient"] >> bit & 1:
                calls.add(prctl, state.PR_CAP_AMBIENT, state.PR_CAP_AMBIENT_RAISE, bit, 0, 0, must=False)
    calls.add(prctl, state.PR_SET_SECUREBITS, image.securebits, must=False)
    calls.add(
        "capset", header, calls.data(_sets(c["effective"], c["permitted"], c["inheritable"])), label="capabilities"
    )
    if c["no_new_privs"]:
        calls.add(prctl, state.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    calls.add(prctl, state.PR_SET_DUMPABLE, image.dumpable & 1, must=False)
    if leader:
        calls.add(prctl, state.PR_SET_PDEATHSIG, image.death_signal)
    calls.add("personality", image.personality & ALL_SIGNALS)


def _sets(effective: int, permitted: int, inheritable: int) -> bytes:
    low = [x & 0xFFFFFFFF for x in (effective, permitted, inheritable)]
    high = [x >> 32 for x in (effective, permitted, inheritable)]
    return struct.pack("<6I", *low, *high)
