"""What a worker leaves written down in case it is killed: the process it has a scratch mapping in.

The abandoned process heals and runs on by itself, but cannot unmap the page that its last instruction was on. Whoever
reaps
the worker (the zygote) has `clean_up` do it.
"""

import contextlib
import mmap
import struct
import time
from typing import Final

from engine.linux import procfs

_NOTE: Final = struct.Struct("<qqqq")  # pid, start time (clock ticks), address, length; pid 0: nothing
_PATIENCE_S: Final = 10.0
_current: mmap.mmap | None = None


def use(shared: mmap.mmap) -> None:
    """Write notes into this memory from now on."""
    global _current
    _current = shared


def write(pid: int, starttime: int, address: int, length: int) -> None:
    """The process has a scratch at this address."""
    if _current is not None:
        _NOTE.pack_into(_current, 0, pid, starttime, address, length)


def erase() -> None:
    """It has none any more."""
    if _current is not None:
        _NOTE.pack_into(_current, 0, 0, 0, 0, 0)


def pending(shared: mmap.mmap) -> bool:
    """Whether there is something to clean up."""
    return bool(_NOTE.unpack_from(shared)[0])


def clean_up(shared: mmap.mmap) -> None:
    """Take the mapping away, once the process has left it. Does nothing when the process or the mapping is gone."""
    from engine.freeze import freeze

    pid, starttime, address, length = _NOTE.unpack_from(shared)
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            try:
                if procfs.parse_stat(procfs.read(f"/proc/{pid}/stat")).starttime != starttime:
                    return
            except (FileNotFoundError, ProcessLookupError):
                return
            frozen = freeze(pid)
            try:
                inside = any(address <= t.registers.rip < address + length for t in frozen.threads)
                if not inside and frozen.has_scratch(address, length):
                    frozen.drop_scratch(address)
            finally:
                frozen.release()
            if not inside:
                return
        time.sleep(0.01)
