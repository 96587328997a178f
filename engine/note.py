"""What a worker leaves written down in case it is killed: the process it has a scratch mapping in, the ghost in
which it has mapped memory for what is still to come home, and the process that runs and whose memory it fills.

The abandoned process heals and runs on by itself, but cannot unmap the page that its last instruction was on. Whoever
reaps
the worker (the zygote) has `clean_up` do it.
"""

import contextlib
import mmap
import struct
import time
from typing import Final

from engine import guard
from engine.linux import procfs

SIZE: Final = 1 << 16  # bytes of the shared memory
_NOTE: Final = struct.Struct("<qqqq")  # pid, start time (clock ticks), address, length; pid 0: nothing
_FILL: Final = struct.Struct("<qqq")  # pid, start time, inode of its pid namespace; pid 0: nothing; at _FILL_AT
_FILL_AT: Final = 32
_STAGE: Final = struct.Struct("<qqq")  # pid, start time, number of spans, which follow as (start, end); at _STAGE_AT
_SPAN: Final = struct.Struct("<QQ")
_STAGE_AT: Final = 64
SPANS_MAX: Final = (SIZE - _STAGE_AT - _STAGE.size) // _SPAN.size
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


def fill(pid: int, starttime: int = 0, space: int = 0) -> None:
    """The process must not run on without this worker; 0: it may. Arguments as of `engine.guard.end`."""
    if _current is not None:
        _FILL.pack_into(_current, _FILL_AT, pid, starttime, space)


def stage(pid: int, starttime: int, spans: list[tuple[int, int]]) -> None:
    """The process has memory mapped in these spans that is not its own; no spans: none any more.

    Raises:
        OSError: they are too many.
    """
    if len(spans) > SPANS_MAX:
        raise OSError(12, f"more than {SPANS_MAX} mappings to prepare")
    if _current is not None:
        _STAGE.pack_into(_current, _STAGE_AT, 0, 0, 0)
        for index, span in enumerate(spans):
            _SPAN.pack_into(_current, _STAGE_AT + _STAGE.size + index * _SPAN.size, *span)
        if spans:
            _STAGE.pack_into(_current, _STAGE_AT, pid, starttime, len(spans))


def pending(shared: mmap.mmap) -> bool:
    """Whether there is something to clean up."""
    notes = (_NOTE.unpack_from(shared), _FILL.unpack_from(shared, _FILL_AT), _STAGE.unpack_from(shared, _STAGE_AT))
    return any(pid for pid, *_ in notes)


def clean_up(shared: mmap.mmap) -> None:
    """Take away what is left over, where the process that has it still lives."""
    if (filled := _FILL.unpack_from(shared, _FILL_AT))[0]:
        guard.end(*filled)
    _leave_scratch(*_NOTE.unpack_from(shared))
    pid, starttime, count = _STAGE.unpack_from(shared, _STAGE_AT)
    raw = shared[_STAGE_AT + _STAGE.size :][: count * _SPAN.size]
    if pid:
        _unstage(pid, starttime, list(_SPAN.iter_unpack(raw)))


def _unstage(pid: int, starttime: int, spans: list[tuple[int, int]]) -> None:
    from engine.freeze import freeze
    from engine.runner import Calls

    with contextlib.suppress(OSError):
        if procfs.parse_stat(procfs.read(procfs.own_file(pid, "stat"))).starttime != starttime:
            return
        frozen = freeze(pid)
        try:
            calls = Calls(frozen.open_injection())
            for start, end in spans:
                calls.add("munmap", start, end - start, must=False)
            calls.run()
        finally:
            frozen.release()


def _leave_scratch(pid: int, starttime: int, address: int, length: int) -> None:
    """Take the scratch away, once the process has left it. Does nothing when the process or the mapping is gone."""
    from engine.freeze import freeze

    deadline = time.monotonic() + _PATIENCE_S
    while pid and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            try:
                if procfs.parse_stat(procfs.read(procfs.own_file(pid, "stat"))).starttime != starttime:
                    return
            except (FileNotFoundError, ProcessLookupError):
                return
            frozen = freeze(pid)
            try:
                inside = any(address <= t.registers.pc < address + length for t in frozen.threads)
                if not inside and frozen.has_scratch(address, length):
                    frozen.drop_scratch(address)
            finally:
                frozen.release()
            if not inside:
                return
        time.sleep(0.01)
