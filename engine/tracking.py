"""Which pages of a running process have been written: its private memory, watched from outside.

A userfaultfd is made inside the process, in a stop of a millisecond, and taken out of it at once: from then on the
kernel records first writes, and nobody need answer anything. Closing our descriptor ends it, and so does our death.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from engine.freeze import Frozen, freeze
from engine.linux import pagemap, process_vm, procfs, userfaultfd
from engine.linux.libc import NR, is_error
from engine.linux.procfs import Vma
from engine.memory import WATCHED
from engine.runner import Calls, row
from engine.spans import Spans

SMALLEST: Final = 128 << 10  # bytes; what is smaller is copied faster than looked after
_PROT_WRITE: Final = 2
# Not told by their contents alone, or made by mmap flags that a mapping cannot be given later.
_LEFT_OUT: Final = frozenset(("sh", "gd", "sl", "dp", "ht", "io", "pf", "um", "ss", "mm"))
_O_DIRECT: Final = 0o40000


class Unwatchable(OSError):
    """The writes of this process cannot be recorded: it is copied while it stands still."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EOPNOTSUPP, why)


def is_plain(vma: Vma) -> bool:
    """Whether a mapping is private anonymous memory that the process writes to. Flags of smaps count where read."""
    named = vma.path == "" or vma.path == "[heap]" or vma.path.startswith("[anon:")
    large = vma.end - vma.start >= SMALLEST
    return named and large and not vma.shared and bool(vma.prot & _PROT_WRITE) and not vma.flags & _LEFT_OUT


def is_watched(vma: Vma) -> bool:
    """Whether writes to a mapping are recorded by a userfaultfd."""
    return WATCHED in vma.flags


def writes_past_us(pid: int) -> bool:
    """Whether it may have devices write into its pages without a fault (O_DIRECT), which nobody records."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(f"/proc/{pid}/fdinfo"):
            with contextlib.suppress(FileNotFoundError):
                raw = procfs.read(f"/proc/{pid}/fdinfo/{name}")
                flags = next((line[6:] for line in raw.splitlines() if line.startswith(b"flags:")), b"0")
                if int(flags, 8) & _O_DIRECT:
                    return True
    return False


@dataclass(slots=True)
class Watch:
    """The record of one process's writes.

    Attributes:
        pid: host pid.
    """

    pid: int
    _fd: int = field(default=-1, init=False)

    @classmethod
    def begin(cls, pid: int) -> "Watch":
        """Watch all of a process's plain memory.

        Raises:
            Unwatchable: the kernel cannot, or not for this process.
            OSError: it is gone, or does not stop.
        """
        if not userfaultfd.works():
            raise Unwatchable("this kernel keeps no record of writes (userfaultfd with WP_ASYNC)")
        if writes_past_us(pid):
            raise Unwatchable("it has files open with O_DIRECT")
        watch = cls(pid)
        with watch._stopped() as frozen:
            watch._fd = _descriptor(frozen)
            try:
                userfaultfd.enable(watch._fd)
                watch._register(frozen)
            except BaseException:
                watch.close()
                raise
        return watch

    @contextlib.contextmanager
    def _stopped(self) -> Iterator[Frozen]:
        frozen = freeze(self.pid)
        try:
            yield frozen
        finally:
            frozen.release()

    def extend(self) -> None:
        """Watch the mappings that are new as well.

        The process stands still meanwhile: a mapping that grew under our hands would be watched in part, so cut in two.

        Raises:
            OSError: ESRCH, it has run another program, or is gone.
        """
        with self._stopped() as frozen:
            self._register(frozen)

    def _register(self, frozen: Frozen) -> None:
        for vma in procfs.parse_maps(procfs.read(f"{frozen.live}/maps")):
            scratch = frozen.injection is not None and frozen.injection.base == vma.start
            if is_plain(vma) and not scratch:
                try:
                    userfaultfd.register(self._fd, vma.start, vma.end)
                except OSError as error:
                    if error.errno == errno.ESRCH:
                        raise
                    # It has a userfaultfd of its own there, or is of a kind that cannot be watched.

    def take(self, span: tuple[int, int]) -> Spans:
        """What was written in a watched span since it was last taken."""
        with self._pagemap() as table:
            return [(address, address + length) for address, length in pagemap.take_written(table, *span)]

    def present(self, span: tuple[int, int]) -> Spans:
        """All private pages in a span."""
        with self._pagemap() as table:
            return [(address, address + length) for address, length in pagemap.private_runs(table, *span)]

    @contextlib.contextmanager
    def _pagemap(self) -> Iterator[int]:
        # Anew each time: an open one goes on showing the address space from before an exec.
        table = os.open(f"/proc/{self.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield table
        finally:
            os.close(table)

    def close(self) -> None:
        """End the record; the process's memory is as it was."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _descriptor(frozen: Frozen) -> int:
    """A userfaultfd of the process's memory, which the process itself does not have any more."""
    injection = frozen.open_injection()
    taken = {int(name) for name in os.listdir(f"{frozen.live}/fd")}
    number = next(n for n in range(len(taken) + 1) if n not in taken)
    # Should we die before it is closed there: the process closes it itself on its way out of the scratch.
    injection.set_heal([row(NR["close"], number, must=False)])
    calls = Calls(injection)
    calls.add("userfaultfd", userfaultfd.FLAGS, must=False)
    made = calls.run()[0]
    if is_error(made):
        raise Unwatchable(f"userfaultfd in process {frozen.pid}: {os.strerror(-made)}")
    pidfd = process_vm.pidfd_open(frozen.pid)
    try:
        return process_vm.pidfd_getfd(pidfd, made)
    finally:
        os.close(pidfd)
        calls = Calls(injection)
        calls.add("close", made)
        calls.run()
        injection.set_heal([])
