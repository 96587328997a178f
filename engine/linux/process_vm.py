"""process_vm_readv(2), process_vm_writev(2) and /proc/PID/mem: another process's memory."""

import ctypes
import errno
import os

from engine.linux.libc import LIBC, syscall
from engine.linux.x86_64 import NR

_readv = LIBC.process_vm_readv
_readv.restype = ctypes.c_ssize_t
_writev = LIBC.process_vm_writev
_writev.restype = ctypes.c_ssize_t
IOV_MAX = 1024


class Iovec(ctypes.Structure):
    """struct iovec."""

    _fields_ = [("base", ctypes.c_uint64), ("length", ctypes.c_uint64)]

    base: int
    length: int


def read(pid: int, address: int, length: int) -> bytes:
    """Bytes of another process; may be short at the end of what is mapped. Raises OSError(EFAULT) when nothing is
    there.
    """
    buffer = ctypes.create_string_buffer(length)
    local, remote = Iovec(ctypes.addressof(buffer), length), Iovec(address, length)
    count = _check(_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0), pid)
    return buffer.raw[:count]


def write(pid: int, address: int, data: bytes) -> None:
    """Write whole `data` into writable memory of another process. Raises OSError(EFAULT)."""
    buffer = (ctypes.c_char * len(data)).from_buffer_copy(data)
    local, remote = Iovec(ctypes.addressof(buffer), len(data)), Iovec(address, len(data))
    if _check(_writev(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0), pid) != len(data):
        raise OSError(14, os.strerror(14), f"memory of process {pid}")


def transfer(pid: int, local: int, runs: list[tuple[int, int]], inward: bool) -> int:
    """Move runs of (remote address, length) to or from one local buffer at address `local`.

    Args:
        inward: True reads from the process, False writes into it.

    Returns:
        Bytes moved; fewer than the sum when a page on the way may not be touched.
    """
    count = len(runs)
    remote = (Iovec * count)(*runs)
    total = sum(length for _, length in runs)
    near = Iovec(local, total)
    call = _readv if inward else _writev
    return _check(call(pid, ctypes.byref(near), 1, remote, count, 0), pid)


def force_write(memory: int, address: int, data: bytes | memoryview) -> None:
    """Write through a `/proc/PID/mem` descriptor, which disregards protection. Raises OSError."""
    done = 0
    view = memoryview(data)
    while done < len(view):
        count = os.pwrite(memory, view[done:], address + done)
        if not count:  # what proc_pid_mem(5) says once the process has been killed
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), "memory of the process")
        done += count


def pidfd_open(pid: int) -> int:
    """pidfd_open(2)."""
    return syscall(NR["pidfd_open"], pid, 0, subject=f"process {pid}")


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """pidfd_getfd(2): a duplicate (close-on-exec) of another process's descriptor."""
    return syscall(NR["pidfd_getfd"], pidfd, fd, 0, subject=f"descriptor {fd}")


def _check(result: int, pid: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"memory of process {pid}")
    return result
