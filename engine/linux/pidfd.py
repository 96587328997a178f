"""pidfd_open(2), pidfd_send_signal(2): signals that cannot reach the wrong process."""

import os
import signal
import struct
from typing import Final

from engine.linux.libc import NR, syscall

_SI_QUEUE: Final = -1  # <asm-generic/siginfo.h>
_SIGINFO_BYTES: Final = 128


def send(pidfd: int, number: int) -> None:
    """Send a plain signal, as kill(2) does. Raises OSError(ESRCH)."""
    signal.pidfd_send_signal(pidfd, number)


def queue(pidfd: int, number: int, value: int, uid: int) -> None:
    """Send a signal with a 64-bit value, as sigqueue(3) does, and with any uid as its sender's.

    Raises:
        OSError: ESRCH, or EAGAIN when the receiver's queue is full.
    """
    # siginfo_t: si_signo, si_errno, si_code, padding, si_pid, si_uid, si_value
    info = struct.pack("=iiiiiIQ", number, 0, _SI_QUEUE, 0, os.getpid(), uid, value)
    syscall(NR["pidfd_send_signal"], pidfd, number, info.ljust(_SIGINFO_BYTES, b"\0"), 0)
