"""<sys/shm.h>, shmget(2), shmat(2), shmctl(2), and /proc/sys/kernel/shm_next_id: System V shared memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from engine.linux.libc import syscall

SHMAT: Final = 30  # <asm/unistd_64.h>
_SHMGET: Final = 29
_SHMCTL: Final = 31
_SHMDT: Final = 67
_SETNS: Final = 308
_CLONE_NEWIPC: Final = 0x08000000  # <linux/sched.h>
_IPC_CREAT_EXCL: Final = 0o3000  # <linux/ipc.h>
_IPC_RMID: Final = 0
_IPC_SET: Final = 1
_IPC_STAT: Final = 2
_SHM_LOCK: Final = 11
SHM_RDONLY: Final = 0o10000
SHM_REMAP: Final = 0o40000
SHM_EXEC: Final = 0o100000
SHM_DEST: Final = 0o1000  # of the mode: it goes with the last attachment
SHM_LOCKED: Final = 0o2000
_NEXT: Final = "/proc/sys/kernel/shm_next_id"
# struct shmid64_ds of <asm-generic/shmbuf.h>: key, uid, gid, cuid, cgid, mode; size; nattch
_STATUS: Final = struct.Struct("<iIIIII24xQ32xQ16x")


@dataclass(frozen=True, slots=True)
class Segment:
    """As IPC_STAT tells it. `mode` has SHM_DEST and SHM_LOCKED as well; `size` in bytes."""

    id: int
    key: int
    uid: int
    gid: int
    cuid: int
    cgid: int
    mode: int
    size: int
    attachments: int


@contextlib.contextmanager
def namespace(fd: int) -> Iterator[None]:
    """In this context the caller's thread is in the IPC namespace that a descriptor refers to. Raises OSError."""
    own = os.open("/proc/self/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscall(_SETNS, fd, _CLONE_NEWIPC)
        try:
            yield
        finally:
            syscall(_SETNS, own, _CLONE_NEWIPC)
    finally:
        os.close(own)


def stat(segment: int) -> Segment:
    """Raises OSError: EINVAL, there is none with this id."""
    status = ctypes.create_string_buffer(_STATUS.size)
    syscall(_SHMCTL, segment, _IPC_STAT, status)
    return Segment(segment, *_STATUS.unpack(status.raw))


def create(like: Segment) -> None:
    """Make an empty one with the id and key of another, its owner and mode.

    Raises:
        OSError: EEXIST, the id or the key is another's.
    """
    with open(_NEXT, "w") as file:
        file.write(str(like.id))
    os.setegid(like.cgid)
    os.seteuid(like.cuid)
    try:
        made = syscall(_SHMGET, like.key, like.size, _IPC_CREAT_EXCL | like.mode & 0o777)
    finally:
        os.seteuid(0)
        os.setegid(0)
    try:
        if made != like.id:
            raise FileExistsError(17, f"System V shared memory {like.id} is there already")
        status = _STATUS.pack(0, like.uid, like.gid, 0, 0, like.mode & 0o777, 0, 0)
        syscall(_SHMCTL, made, _IPC_SET, ctypes.create_string_buffer(status, len(status)))
        if like.mode & SHM_LOCKED:
            syscall(_SHMCTL, made, _SHM_LOCK, 0)
    except OSError:
        remove(made)
        raise


def remove(segment: int) -> None:
    """It goes with its last attachment. Raises OSError."""
    syscall(_SHMCTL, segment, _IPC_RMID, 0)


def attach(segment: int) -> int:
    """Attach it to the caller; returns the address. Raises OSError."""
    return syscall(SHMAT, segment, 0, 0)


def detach(address: int) -> None:
    """Raises OSError."""
    syscall(_SHMDT, address)
