"""Switching kernels: kexec_file_load(2) and reboot(2)."""

from __future__ import annotations

import ctypes
import os

_KEXEC_FILE_LOAD = 320  # arch/x86/entry/syscalls/syscall_64.tbl
_REBOOT_KEXEC = 0x45584543  # linux/reboot.h


def load(kernel: int, image: int, command_line: str) -> None:
    """Make the next kernel ready. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    text = command_line.encode() + b"\0"
    arguments = (ctypes.c_long(kernel), ctypes.c_long(image), ctypes.c_ulong(len(text)), text, ctypes.c_ulong(0))
    if libc.syscall(ctypes.c_long(_KEXEC_FILE_LOAD), *arguments) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"the kernel cannot be loaded: {os.strerror(errno)}")


def switch() -> None:
    """Start it. Does not return where it works; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.sync()
    libc.reboot(ctypes.c_int(_REBOOT_KEXEC))
    errno = ctypes.get_errno()
    raise OSError(errno, f"the kernels cannot be switched: {os.strerror(errno)}")
