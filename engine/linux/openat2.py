"""openat2(2): open a path inside another root, which neither a symbolic link nor `..` leaves."""

import os
import struct
from typing import Final

from engine.linux.libc import syscall

_OPENAT2: Final = 437
_RESOLVE_NO_SYMLINKS: Final = 0x04  # with it, no magic links either
_RESOLVE_BENEATH: Final = 0x08
_RESOLVE_IN_ROOT: Final = 0x10


def open_in_root(root: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Open `path` as a process with that root would; the descriptor is close-on-exec.

    Args:
        root: descriptor of the root directory.

    Raises:
        OSError: as of open(2), with the path as its file name.
    """
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, _RESOLVE_IN_ROOT)
    return syscall(_OPENAT2, root, path + b"\0", how, len(how), subject=os.fsdecode(path))


def open_beneath(root: int, path: bytes, flags: int) -> int:
    """Open `path` below a directory; a symbolic link in it is an error (ELOOP), `..` above `root`, too (EXDEV).

    Args:
        root: descriptor of the directory.

    Raises:
        OSError: as of open(2), with the path as its file name.
    """
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH)
    return syscall(_OPENAT2, root, path + b"\0", how, len(how), subject=os.fsdecode(path))
