"""<linux/eventpoll.h>, epoll(7): as plain descriptors (select.epoll would close them)."""

import os
import struct
from typing import Final

from engine.linux.libc import syscall

_EPOLL_CREATE1: Final = 291
EPOLL_CTL: Final = 233  # system-call number, for the rows that run in the process
CTL_ADD: Final = 1


def create() -> int:
    """An empty set, close-on-exec. Raises OSError."""
    return syscall(_EPOLL_CREATE1, os.O_CLOEXEC)


def event(events: int, data: int) -> bytes:
    """struct epoll_event, packed on x86-64."""
    return struct.pack("=IQ", events, data)
