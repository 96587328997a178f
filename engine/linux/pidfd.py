"""pidfd_open(2), pidfd_send_signal(2): signals that cannot reach the wrong process."""

import os
import signal
import struct
from typing import Final

from engine.linux.libc import syscall
from engine.linux.x86_64 import NR

_SI_QUEUE: Final = -1  # <asm-generic/siginfo.h>
_SIGINFO_BYTES: Final = 128


def send(pidfd: int, number: int) -> None:
    """Send a plain signal, as kill(2) does. Raises OSError(ESRCH)."""
    signal.pidfd_send_signal(pidfd, number)


def queue(pidfd: int, number: int, value: int, uid: int, more: int = 0, sender: int | None = None) -> None:
    """Send a signal with a 64-bit value, as sigqueue(3) does, and with any uid as its sender's.

    Args:
        more: 32 bits for si_errno, which nobody else uses.
        sender: si_pid; the kernel makes it 0 where the receiver is in another pid namespace.

    Raises:
        OSError: ESRCH, or EAGAIN when the receiver's queue is full.
    """
    # siginfo_t: si_signo, si_errno, si_code, padding, si_pid, si_uid, si_value
    pid = os.getpid() if sender is None else sender
    info = struct.pack("=iIiiiIQ", number, more, _SI_QUEUE, 0, pid, uid, value)
    syscall(NR["pidfd_send_signal"], pidfd, number, info.ljust(_SIGINFO_BYTES, b"\0"), 0)
