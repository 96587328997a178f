"""<linux/timerfd.h>, timerfd_create(2)."""

import os
import struct
from typing import Final

from engine.linux.libc import syscall
from engine.linux.x86_64 import NR

_TIMERFD_CREATE: Final = 283
_TIMERFD_SETTIME: Final = 286
TFD_TIMER_ABSTIME: Final = 1
TFD_TIMER_CANCEL_ON_SET: Final = 2
_SET_TICKS: Final = 0x40085400  # _IOW('T', 0, __u64), <linux/timerfd.h>


def create(clock: int) -> int:
    """A disarmed timer descriptor, close-on-exec. Raises OSError."""
    return syscall(_TIMERFD_CREATE, clock, os.O_CLOEXEC)


def arm(fd: int, flags: int, value_ns: int, interval_ns: int) -> None:
    """timerfd_settime(2), times in ns. Raises OSError."""
    spec = struct.pack("=4q", *divmod(interval_ns, 10**9), *divmod(value_ns, 10**9))
    syscall(_TIMERFD_SETTIME, fd, flags, spec, 0)


def set_ticks(fd: int, ticks: int) -> None:
    """Make `ticks` unread expirations (kernels with CONFIG_CHECKPOINT_RESTORE). Raises OSError."""
    syscall(NR["ioctl"], fd, _SET_TICKS, struct.pack("=Q", ticks))
