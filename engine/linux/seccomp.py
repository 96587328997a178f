"""<linux/seccomp.h>, <linux/filter.h>; seccomp(2): constants, and classic BPF with names for the places to jump to."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

NR_SECCOMP: Final = 317  # <asm/unistd_64.h>
SET_MODE_FILTER: Final = 1
TSYNC: Final = 1 << 0
NEW_LISTENER: Final = 1 << 3  # Linux 5.0
TSYNC_ESRCH: Final = 1 << 4  # Linux 5.7
WAIT_KILLABLE_RECV: Final = 1 << 5  # Linux 5.19

USER_NOTIF: Final = 0x7FC00000
ALLOW: Final = 0x7FFF0000

# struct seccomp_data
NUMBER: Final = 0
ARCH: Final = 4
ARCH_X86_64: Final = 0xC000003E  # <linux/audit.h>

EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_RET: Final = 0x06  # BPF_RET | BPF_K


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction; `then`, `otherwise`: labels, empty for the next one."""

    code: int
    k: int
    then: str = ""
    otherwise: str = ""
    label: str = ""


def argument(index: int) -> int:
    """Where the low half of a call's argument is."""
    return 16 + 8 * index


def load(offset: int, label: str = "") -> Step:
    """A word of struct seccomp_data."""
    return Step(_LOAD, offset, label=label)


def jump(condition: int, k: int, then: str = "", otherwise: str = "") -> Step:
    """On what was loaded last: EQUAL or ANY_BIT."""
    return Step(condition, k, then, otherwise)


def ret(action: int, label: str = "") -> Step:
    """What becomes of the call."""
    return Step(_RET, action, label=label)


def assemble(steps: Sequence[Step]) -> bytes:
    """The instructions (struct sock_filter)."""
    places = {step.label: index for index, step in enumerate(steps) if step.label}

    def distance(index: int, label: str) -> int:
        return places[label] - index - 1 if label else 0

    return b"".join(
        struct.pack("<HBBI", step.code, distance(i, step.then), distance(i, step.otherwise), step.k)
        for i, step in enumerate(steps)
    )
