"""Mappings and pages of a frozen process: what they are, why some cannot move, and the stream of changed pages."""

import array
import ctypes
import os
from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from engine import lending, nameless, outsiders
from engine.descriptors.kin import Kin
from engine.foresight import still_said
from engine.freeze import Frozen
from engine.image import MappedFile, Region
from engine.linux import pagemap, process_vm, procfs
from engine.linux.procfs import Vma
from engine.runner import ProcessGone
from engine.spans import Spans, both, of_runs, runs, without

CHUNK: Final = 1 << 20  # bytes moved at a time: fits the cache, reused
MAP_SHARED: Final = 1
MAP_PRIVATE: Final = 2
MAP_DROPPABLE: Final = 8
MAP_ANONYMOUS: Final = 0x20
MAP_GROWSDOWN: Final = 0x100
MAP_NORESERVE: Final = 0x4000
_PROT_EXEC: Final = 4
SPECIAL: Final = ("[vvar]", "[vvar_vclock]", "[vdso]")

# VmFlags of proc(5) -> MADV_* of <asm-generic/mman-common.h>
_ADVICE: Final = {"rr": 1, "sr": 2, "dc": 10, "mg": 12, "hg": 14, "nh": 15, "dd": 16, "wf": 18}
HUGE: Final = "ht"  # among VmFlags: pages of hugetlb
WATCHED: Final = "uw"  # among VmFlags: a userfaultfd records writes, or answers them
_UNMOVABLE: Final = {
    "io": "device memory", "pf": "device memory", "um": "userfaultfd", "uw":
    "userfaultfd",
    "ss": "a shadow stack", "mm": "mixed device memory",
}  # fmt: skip


class Survey:
    """The mappings of one frozen process, sorted into what the image carries.

    Attributes:
        regions, files, special: as in the image.
        refusals: why it cannot move, in words.
        whole: spans of files that are gone: carried as anonymous memory with all their bytes.
        shared: spans of shared anonymous memory.
        bare_code: executable mappings without a file.
        clean: pages that have not been written since they were sent, as far as `watched`.
        foreseen: what smaps said a moment ago, where this rests on that; else nothing.
        known: pages in what `runs` was to leave for later, where they cannot be told then; else None.

    Args:
        marks: reads our own record of its writes (engine/tracking.py), where there is one: all private pages, those
            written since they were last taken, and the others.
        digests: whether files are to be known by their content.
        foreseen: its smaps, read a moment before it stood still (engine/foresight.py).
        kin: what it shares with others that move with it.
        files_only: which files it maps is all that counts.
    """

    def __init__(
        self, frozen: Frozen, marks: "Callable[[], tuple[Runs, Runs]] | None" = None, digests: bool = False,
        foreseen: bytes = b"", kin: Kin | None = None, files_only: bool = False,
    ) -> None:  # fmt: skip
        self._frozen, self._digests, self._kin = frozen, digests, kin or Kin()
        self._watched = marks is not None
        self._marks = _begin(marks) if marks is not None else None
        self.clean: list[tuple[int, int]] = []
        self.regions: list[Region] = []
        self.files: list[MappedFile] = []
        self.special: list[list[object]] = []
        self.refusals: list[str] = []
        self.whole: list[tuple[int, int]] = []
        self.shared: list[Vma] = []
        self.bare_code: list[Vma] = []
        self._index: dict[tuple[int, int, int, bool], int] = {}
        self._spans: list[tuple[int, int]] = []
        self._carried: Container[tuple[int, int]] = ()
        self._later: Spans = []
        self.known: Spans | None = None
        self._handed: set[tuple[int, int, int]] = set()  # of `shared`, what the others that move are handed as well
        scratch = frozen.injection.base if frozen.injection else 0
        self.foreseen = still_said(frozen, foreseen) if foreseen else b""
        raw = self.foreseen or procfs.read(f"{frozen.live}/{'maps' if files_only else 'smaps'}")
        self._vmas = frozen.vmas = procfs.parse_maps(raw) if files_only else procfs.parse_smaps(raw)
        self._page_sizes = procfs.huge_page_sizes(raw) if HUGE.encode() in raw else {}
        for vma in self._vmas:
            if not (scratch and vma.start == scratch):
                self._add(vma)
        if b"\nProtectionKey:" in raw and _uses_keys(raw):
            self._refuse("it uses memory protection keys")
        self._refuse_shared()

    def _refuse(self, text: str) -> None:
        if text not in self.refusals:
            self.refusals.append(text)

    def _add(self, vma: Vma) -> None:
        if vma.path in SPECIAL:
            self.special.append([vma.path, vma.start, vma.end])
            return
        if not vma.flags.isdisjoint(_UNMOVABLE):
            for flag, what in _UNMOVABLE.items():
                if flag in vma.flags and not (flag == WATCHED and self._watched):
                    self._refuse(f"it maps {what} at {vma.start:#x}" + (f" ({vma.path})" if vma.path else ""))
                    return
        if HUGE in vma.flags and not (vma.path.startswith("/SYSV") and not self._kin.memory):
            kind = nameless.huge_flags(vma, self._vmas, self._page_sizes[vma.start])
            if kind is None:
                self._refuse(f"it maps huge pages (hugetlb) of a file at {vma.start:#x} ({vma.path})")
                return
            flags, file = kind | MAP_ANONYMOUS | (MAP_SHARED if vma.shared else MAP_PRIVATE), -1
            if vma.shared:  # of which our page tables may know less than there is
                self.shared.append(vma)
                self.whole.append((vma.start, vma.end))
            self._describe(vma, flags, file)
            return
        anonymous = vma.path == "" or vma.path.startswith(("[heap]", "[stack", "[anon:"))
        if anonymous:
            flags, file = MAP_PRIVATE | MAP_ANONYMOUS, -1
            if vma.prot & _PROT_EXEC:
                self.bare_code.append(vma)
        elif (index := self._lent(vma)) >= 0:
            flags, file = MAP_SHARED if vma.shared else MAP_PRIVATE, index
        elif vma.shared and (nameless.is_nameless(vma) or self._is_handed(vma)):
            flags, file = self._nameless(vma)
            self.shared.append(vma)
        else:
            found = self._file(vma)
            if found is None:
                return
            flags, file = found
        self._describe(vma, flags, file)

    def _describe(self, vma: Vma, flags: int, file: int) -> None:
        self._spans.append((vma.start, vma.end))
        if "gd" in vma.flags:
            flags |= MAP_GROWSDOWN
        if "nr" in vma.flags:
            flags |= MAP_NORESERVE
        if "dp" in vma.flags:
            flags = flags & ~MAP_PRIVATE | MAP_DROPPABLE
        name = vma.path[6:-1].encode() if vma.path.startswith("[anon:") else b""
        advice = []
        if not vma.flags.isdisjoint(_ADVICE):
            implied = ("wf", "dd") if "dp" in vma.flags else ()
            advice = [value for flag, value in _ADVICE.items() if flag in vma.flags and flag not in implied]
        lock = (2 if "lf" in vma.flags else 1) if "lo" in vma.flags else 0
        offset = vma.offset if file >= 0 else 0
        region = Region(vma.start, vma.end, vma.prot, flags, file, offset, advice, lock, name, "sl" in vma.flags)
        self.regions.append(region)

    def _is_handed(self, vma: Vma) -> bool:
        """Whether it maps memory with a name that others map who move with it."""
        if not self._kin.memory or not vma.path.startswith("/"):
            return False
        info = os.stat(f"/proc/{self._frozen.pid}/map_files/{vma.start:x}-{vma.end:x}")
        return (info.st_dev, info.st_ino) in self._kin.memory

    def _nameless(self, vma: Vma) -> tuple[int, int]:
        key = (vma.major, vma.minor, vma.inode, True)
        if key not in self._index:
            plain = nameless.is_plain(vma, self._vmas)
            if plain and not self._kin.memory:
                return MAP_SHARED | MAP_ANONYMOUS, -1
            file = nameless.describe(self._frozen.pid, vma)
            if (file.device, file.inode) in self._kin.memory:
                self._handed.add((vma.major, vma.minor, vma.inode))
            elif plain:
                return MAP_SHARED | MAP_ANONYMOUS, -1
            self._index[key] = len(self.files)
            self.files.append(file)
        return MAP_SHARED, self._index[key]

    def _file(self, vma: Vma) -> tuple[int, int] | None:
        if vma.path.startswith("/SYSV"):
            self._refuse(f"it has System V shared memory attached ({vma.path})")
        elif vma.path.startswith("/[aio]"):
            self._refuse("it has a queue of asynchronous I/O (io_setup)")
        elif vma.path.startswith("/secretmem"):
            self._refuse("it has secret memory (memfd_secret)")
        elif vma.path.startswith(("anon_inode:", "[")) or not vma.path.startswith("/"):
            self._refuse(f"it maps {vma.path}")
        elif vma.deleted:
            self.whole.append((vma.start, vma.end))
            return MAP_PRIVATE | MAP_ANONYMOUS, -1
        elif vma.path.startswith("/dev/") and vma.path != "/dev/zero" and not vma.path.startswith("/dev/shm/"):
            self._refuse(f"it maps the device {vma.path}")
        else:
            writable = vma.shared and "mw" in vma.flags
            key = (vma.major, vma.minor, vma.inode, writable)
            if key not in self._index:
                link = f"/proc/{self._frozen.pid}/map_files/{vma.start:x}-{vma.end:x}"
                self._index[key] = self._add_file(vma.path, link, writable)
            return (MAP_SHARED if vma.shared else MAP_PRIVATE), self._index[key]
        return None

    def _lent(self, vma: Vma) -> int:
        """The index of the file that a mapped memfd stands for; -1: it stands for none."""
        key = (vma.major, vma.minor, vma.inode, False)
        if key not in self._index:
            link = f"/proc/{self._frozen.pid}/map_files/{vma.start:x}-{vma.end:x}"
            file = lending.original(vma.path, link)
            if file is None:
                return -1
            self._index[key] = len(self.files)
            self.files.append(file)
        return self._index[key] if vma.path.startswith("/memfd:") else -1

    def add_link(self, name: str) -> int:
        """Add the file that `exe` or `cwd` leads to; returns its index. Raises OSError."""
        link = f"{self._frozen.live}/{name}"
        path = os.readlink(link)
        file = lending.original(path, link)
        if file is None:
            return self._add_file(path, link)
        self.files.append(file)
        return len(self.files) - 1

    def _add_file(self, path: str, link: str, writable: bool = False) -> int:
        self.files.append(lending.describe(path, link, writable, self._digests))
        return len(self.files) - 1

    def _refuse_shared(self) -> None:
        """Shared memory moves only when nobody else has it, but for what the others that move are handed as well."""
        own: dict[outsiders.Inode, outsiders.Mapped] = {}
        for vma in self.shared:
            key = (vma.major, vma.minor, vma.inode)
            if key not in self._handed and key not in own:
                index = self._index.get((*key, True), -1)
                own[key] = outsiders.Mapped(vma, self.files[index] if index >= 0 else None)
        for _, text in outsiders.find(own, {self._frozen.pid}):
            self._refuse(text)

    def runs(self, carried: Container[tuple[int, int]] = (), later: Spans | None = None) -> list[tuple[int, int]]:
        """(address, length) of all pages to carry, in address order.

        Args:
            carried: (device, inode) of objects whose content travels with descriptors.
            later: what need not be looked at now. A kernel without PAGEMAP_SCAN makes us: `known` says what is there.
        """
        self._carried, self._later = carried, later or []
        descriptor = os.open(f"{self._frozen.live}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not self._spans:
                return []
            found = self._private(descriptor)
            carry = list(_clip(found, self._spans, self._cuts()))
            carry += nameless.runs(self._frozen.pid, [vma for vma in self.shared if not self._is_elsewhere(vma)])
        finally:
            os.close(descriptor)
        carry += [(start, end - start) for start, end in self.whole]
        return sorted(carry)

    def _private(self, descriptor: int) -> list[tuple[int, int]]:
        try:
            if self._marks is not None:
                written, self.clean = self._marks.result()
                return sorted(written + self.clean)
            looked_at = without([(0, min(self._spans[-1][1], 1 << 47))], self._later)
            return [run for start, end in looked_at for run in pagemap.private_runs(descriptor, start, end)]
        except pagemap.NoScan:  # before Linux 6.7: leave out what has no pages, it may be terabytes
            touched = procfs.touched(procfs.read(f"{self._frozen.live}/smaps"))
            found = [run for start, end in touched for run in pagemap.private_entries(descriptor, start, end)]
            if not self._later:
                return found
            self.known = both(of_runs(found), self._later)
            return runs(without(of_runs(found), self._later))

    def _is_elsewhere(self, vma: Vma) -> bool:
        if HUGE in vma.flags:
            return True
        index = self._index.get((vma.major, vma.minor, vma.inode, True), -1)
        return index >= 0 and (self.files[index].device, self.files[index].inode) in self._carried

    def _cuts(self) -> set[int]:
        return {start for start, _ in self.whole} | {vma.start for vma in self.shared}


Runs = list[tuple[int, int]]


def _begin(marks: Callable[[], tuple[Runs, Runs]]) -> Future[tuple[Runs, Runs]]:
    """Look through the page tables while the mappings are looked at."""
    helper = ThreadPoolExecutor(1)
    result = helper.submit(marks)
    helper.shutdown(wait=False)
    return result


def _uses_keys(raw: bytes) -> bool:
    return any(line.split()[1] != b"0" for line in raw.splitlines() if line.startswith(b"ProtectionKey:"))


def _clip(runs: list[tuple[int, int]], spans: list[tuple[int, int]], leave_out: set[int]) -> Iterator[tuple[int, int]]:
    """Runs cut at the bounds of mappings: two neighbours may differ in protection, and vvar and scratch are not ours
    to carry.
    """
    at = 0
    for address, length in runs:
        end = address + length
        while at < len(spans) and spans[at][1] <= address:
            at += 1
        index = at
        while index < len(spans) and spans[index][0] < end:
            first, last = max(address, spans[index][0]), min(end, spans[index][1])
            if spans[index][0] not in leave_out:
                yield first, last - first
            index += 1


_buffer = bytearray(CHUNK)
_buffer_address = ctypes.addressof((ctypes.c_char * CHUNK).from_buffer(_buffer))


def groups(runs: list[tuple[int, int]]) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Runs cut and gathered into pieces of at most CHUNK bytes and IOV_MAX runs; with the bytes of each."""
    group: list[tuple[int, int]] = []
    size = 0
    for address, length in runs:
        while length:
            part = min(length, CHUNK - size)
            group.append((address, part))
            size += part
            address += part
            length -= part
            if size == CHUNK or len(group) == process_vm.IOV_MAX:
                yield group, size
                group, size = [], 0
    if group:
        yield group, size


def copy(pid: int, source: list[tuple[int, int]], target: list[tuple[int, int]], size: int) -> None:
    """Copy a piece of at most CHUNK bytes within a stopped process. Raises OSError."""
    for part, inward in ((source, True), (target, False)):
        if process_vm.transfer(pid, _buffer_address, part, inward=inward) != size:
            raise OSError(14, f"memory of process {pid} could not be moved")


def send_pages(pid: int, memory: int, runs: list[tuple[int, int]], send: Callable[[memoryview], object]) -> int:
    """Stream pages of a stopped process. Returns the bytes sent.

    Args:
        memory: its `/proc/PID/mem`, for pages that it may not read itself.
        send: consumes a buffer wholly before it returns.

    Raises:
        ProcessGone: it has been killed meanwhile: what was sent last need not be what it had.
    """
    view = memoryview(_buffer)
    total = 0
    for group, size in groups(runs):
        try:
            done = process_vm.transfer(pid, _buffer_address, group, inward=True)
        except OSError:
            done = 0
        if done != size:
            _read_by_force(pid, memory, group, view)
        send(view[:size])
        total += size
    return total


def _read_by_force(pid: int, memory: int, group: list[tuple[int, int]], view: memoryview) -> None:
    at = 0
    for address, length in group:
        for page in range(0, length, pagemap.PAGE):
            target = view[at + page : at + page + pagemap.PAGE]
            try:
                count = os.preadv(memory, [target], address + page)
            except OSError:  # beyond the end of a mapped file: nothing there to carry
                target[:] = bytes(pagemap.PAGE)
                continue
            if not count:  # the kernel's way to say that it has been killed
                raise ProcessGone(pid)
        at += length


def receive_pages(
    pid: int,
    memory: int,
    runs: list[tuple[int, int]],
    writable: Callable[[int], bool],
    receive: Callable[[memoryview], None],
) -> None:
    """Fill pages of a process being built from a stream.

    Args:
        writable: whether the mapping at an address may be written by the process itself.
        receive: fills a buffer wholly or raises.
    """
    view = memoryview(_buffer)
    for group, size in groups(runs):
        receive(view[:size])
        at = 0
        direct: list[tuple[int, int]] = []
        first = 0
        for address, length in [*group, (0, 0)]:
            if length and writable(address):
                if not direct:
                    first = at
                direct.append((address, length))
            else:
                if direct and process_vm.transfer(pid, _buffer_address + first, direct, inward=False) != sum(
                    n for _, n in direct
                ):
                    raise OSError(14, "memory of the new process could not be filled")
                direct = []
                if length:
                    process_vm.force_write(memory, address, view[at : at + length])
            at += length


def pack_runs(runs: list[tuple[int, int]]) -> bytes:
    """Runs as the image holds them."""
    return array.array("Q", [x for run in runs for x in run]).tobytes()
