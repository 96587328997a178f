"""setfsuid(2), setgroups(2), capset(2): touch files with somebody else's rights for a moment."""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from engine.linux.libc import LIBC, syscall
from engine.linux.x86_64 import NR

_CAPGET: Final = 125
_VERSION_3: Final = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
# What lets root pass by file permissions: CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID (<linux/capability.h>).
_FILE_CAPABILITIES: Final = 0b11111
EVERYTHING: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Credentials:
    """The rights of a process to files. `effective`: its effective capabilities as a 64-bit set."""

    fsuid: int
    fsgid: int
    groups: tuple[int, ...]
    effective: int

    @property
    def all_powerful(self) -> bool:
        """Whether nothing needs to be given up."""
        return self.fsuid == 0 and self.effective & _FILE_CAPABILITIES == _FILE_CAPABILITIES


@contextmanager
def acting_as(credentials: Credentials) -> Iterator[None]:
    """Have the process's (single thread's) file accesses judged by these credentials; the caller is root.

    Raises:
        OSError: the caller may not.
    """
    if credentials.all_powerful:
        yield
        return
    groups = os.getgroups()
    capabilities = _capabilities()
    os.setgroups(credentials.groups)
    try:
        _set_fs_ids(credentials.fsuid, credentials.fsgid)
        # A non-zero fsuid has cleared the file capabilities; what the process really has comes back here.
        mine = _capabilities()
        allowed = mine[0] & ~_FILE_CAPABILITIES | mine[1] & credentials.effective & _FILE_CAPABILITIES
        _set_capabilities(allowed, *mine[1:])
        yield
    finally:
        _set_fs_ids(os.geteuid(), os.getegid())
        _set_capabilities(*capabilities)
        os.setgroups(groups)


def _set_fs_ids(uid: int, gid: int) -> None:
    LIBC.setfsgid(gid)
    LIBC.setfsuid(uid)
    # Both calls only ever return the value from before: ask once more.
    if LIBC.setfsuid(ctypes.c_uint(-1 & 0xFFFFFFFF)) & 0xFFFFFFFF != uid:
        raise PermissionError(1, f"may not act as user {uid}")


def _capabilities() -> tuple[int, int, int]:
    """(effective, permitted, inheritable) of this thread."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0), 8)
    data = ctypes.create_string_buffer(24)
    syscall(_CAPGET, header, data)
    low = struct.unpack("=6I", data.raw)
    return low[0] | low[3] << 32, low[1] | low[4] << 32, low[2] | low[5] << 32


def _set_capabilities(effective: int, permitted: int, inheritable: int) -> None:
    sets = (effective, permitted, inheritable)
    data = struct.pack("=6I", *(s & 0xFFFFFFFF for s in sets), *(s >> 32 for s in sets))
    syscall(NR["capset"], struct.pack("=Ii", _VERSION_3, 0), data)
