"""signalfd(2)."""

import os
import struct
from typing import Final

from engine.linux.libc import syscall

_SIGNALFD4: Final = 289


def create(mask: int) -> int:
    """A descriptor, close-on-exec, for the signals of a 64-bit set. Raises OSError."""
    return syscall(_SIGNALFD4, -1, struct.pack("=Q", mask), 8, os.O_CLOEXEC)
