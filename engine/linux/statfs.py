"""statfs(2), <sys/vfs.h>: what os.statvfs leaves out is the kind of file system."""

import ctypes
import struct
from typing import Final

from engine.linux.libc import syscall
from engine.linux.x86_64 import NR

FIELDS: Final = ("type", "bsize", "blocks", "bfree", "bavail", "files", "ffree")
_STATFS: Final = struct.Struct("<qqQQQQQiiqqq4q")  # ..., fsid (two ints), namelen, frsize, flags, spare


def statfs(path: str) -> dict[str, int]:
    """The fields of `FIELDS`, and `namelen`. Raises OSError."""
    buffer = ctypes.create_string_buffer(_STATFS.size)
    syscall(NR["statfs"], path.encode() + b"\0", buffer, subject=path)
    fields = _STATFS.unpack(buffer.raw)
    return dict(zip(FIELDS, fields, strict=False)) | {"namelen": fields[9]}
