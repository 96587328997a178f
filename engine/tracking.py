"""Which pages of a running process have been written: its private memory, watched from outside.

Two ways, whichever the kernel has:

* a **userfaultfd** is made inside the process, in a stop of a millisecond, and taken out of it at once: from then on
  the kernel records first writes, and nobody need answer anything. Closing our descriptor ends it, and so does our
  death;
* **soft-dirty** marks (Linux before 6.13, Debian's for one): read and cleared in one stop a round, since a write
  between the two would be lost. Nothing has to be ended.
"""

import contextlib
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Final

from engine.freeze import Frozen, freeze
from engine.linux import pagemap, process_vm, procfs, userfaultfd
from engine.linux.libc import is_error
from engine.linux.procfs import Vma
from engine.linux.x86_64 import NR
from engine.memory import WATCHED, Runs
from engine.runner import Calls, row
from engine.spans import Spans, both, merge, of_runs, runs, without

SMALLEST: Final = 128 << 10  # bytes; what is smaller is copied faster than looked after
_PROT_WRITE: Final = 2
# Not told by their contents alone, or made by mmap flags that a mapping cannot be given later.
_LEFT_OUT: Final = frozenset(("sh", "gd", "sl", "dp", "ht", "io", "pf", "um", "ss", "mm"))
_TASK_SIZE: Final = (1 << 47) - 4096  # end of what a process can map, arch/x86/include/asm/page_64_types.h
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


class Watch(ABC):
    """The record of one process's writes.

    Attributes:
        pid: host pid.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @abstractmethod
    def covers(self, vma: Vma) -> bool:
        """Whether writes to a mapping are recorded, as smaps tells."""

    def begin_round(self) -> None:
        """Comes before the `take` of each span."""
        return

    @abstractmethod
    def extend(self) -> None:
        """Watch the mappings that are new as well. Raises OSError: ESRCH, it runs another program, or is gone."""

    @abstractmethod
    def take(self, span: tuple[int, int]) -> Spans:
        """What was written in a watched span between the last two rounds' beginnings (or since it was last taken)."""

    @abstractmethod
    def present(self, span: tuple[int, int]) -> Spans:
        """All private pages in a span."""

    @abstractmethod
    def marks(self) -> tuple[Runs, Runs]:
        """All private pages of a process that stands still: written since they were last taken, and not."""

    @abstractmethod
    def close(self) -> None:
        """End the record; the process's memory is as it was."""

    @contextlib.contextmanager
    def _stopped(self) -> Iterator[Frozen]:
        frozen = freeze(self.pid)
        try:
            yield frozen
        finally:
            frozen.release()

    @contextlib.contextmanager
    def _pagemap(self) -> Iterator[int]:
        # Anew each time: an open one goes on showing the address space from before an exec.
        table = os.open(f"/proc/{self.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield table
        finally:
            os.close(table)


def begin(pid: int) -> Watch:
    """Watch all of a process's plain memory.

    Raises:
        Unwatchable: the kernel cannot, or not for this process.
        OSError: it is gone, or does not stop.
    """
    if writes_past_us(pid):
        raise Unwatchable("it has files open with O_DIRECT")
    if userfaultfd.works():
        return Recorder(pid)
    if pagemap.has_soft_dirty():
        return SoftDirty(pid)
    raise Unwatchable("this kernel keeps no record of writes (userfaultfd with WP_ASYNC, or soft-dirty)")


class SoftDirty(Watch):
    """By the kernel's soft-dirty marks."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self._written: Spans = []  # had a mark that we have cleared, and has not been taken since

    def covers(self, vma: Vma) -> bool:
        return True

    def begin_round(self) -> None:
        with self._stopped() as frozen, self._pagemap() as table:
            # Of all mappings, since the marks of all are cleared: what cannot go ahead now may later.
            spans = procfs.touched(procfs.read(f"{frozen.live}/smaps"))
            found = of_runs(run for span in spans for run in pagemap.soft_dirty_entries(table, *span)[0])
            self._written = merge([*self._written, *found])
            with open(f"/proc/{self.pid}/clear_refs", "wb", buffering=0) as file:
                file.write(b"4")

    def extend(self) -> None:
        return

    def take(self, span: tuple[int, int]) -> Spans:
        taken = both(self._written, [span])
        self._written = without(self._written, [span])
        return taken

    def present(self, span: tuple[int, int]) -> Spans:
        with self._pagemap() as table:
            return of_runs(pagemap.private_entries(table, *span))

    def marks(self) -> tuple[Runs, Runs]:
        written: Spans = []
        clean: Spans = []
        with self._pagemap() as table:
            for span in procfs.touched(procfs.read(f"/proc/{self.pid}/smaps")):
                dirty, kept = (of_runs(found) for found in pagemap.soft_dirty_entries(table, *span))
                written += dirty
                clean += kept
        owed = both(merge(clean), self._written)
        return runs([*written, *owed]), runs(without(clean, owed))

    def close(self) -> None:
        self._written = []


class Recorder(Watch):
    """By a userfaultfd."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self._fd = -1
        with self._stopped() as frozen:
            self._fd = _descriptor(frozen)
            try:
                userfaultfd.enable(self._fd)
                self._register(frozen)
            except BaseException:
                self.close()
                raise

    def covers(self, vma: Vma) -> bool:
        return WATCHED in vma.flags

    def extend(self) -> None:
        # It stands still meanwhile: a mapping that grew under our hands would be watched in part, so cut in two.
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
        with self._pagemap() as table:
            return [(address, address + length) for address, length in pagemap.take_written(table, *span)]

    def present(self, span: tuple[int, int]) -> Spans:
        with self._pagemap() as table:
            return [(address, address + length) for address, length in pagemap.private_runs(table, *span)]

    def marks(self) -> tuple[Runs, Runs]:
        with self._pagemap() as table:
            return pagemap.marked_runs(table, 0, _TASK_SIZE)

    def close(self) -> None:
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
