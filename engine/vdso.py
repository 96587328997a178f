"""The vDSO of a process under another kernel than the one that gave it.

The process keeps pointers into its vDSO (the C library asks once, at the start), and signal frames may return there. So
where the kernel differs, the old vDSO becomes a **relic**: its code as plain memory at its old place, zero pages where
its vvar was, and each exported entry a jump to the entry of the vDSO that the kernel there gave, which is mapped
somewhere else. What the new one lacks is left as it was: over zero pages the old code makes the system call.

A relic says what it was in the last bytes of its page, behind the code: so a worker anywhere finds it again, gives a
process that is back under its old kernel the real vDSO in place of the relic, and points all other relics there.
(Over zero pages not all code is right that was interrupted in its midst: the coarse clocks would read zero. A thread
that is inside is let run on at the source until it is out; with a signal handler on top of that, the move is refused.)
"""

import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from engine.image import Image, ImageError, Region
from engine.linux import process_vm
from engine.linux.procfs import Vma
from engine.linux.x86_64 import CONTEXT_WORDS, JUMP, NR, Registers, call_and_return, is_context, jump_by
from engine.runner import VDSO_IMAGE

DIGEST: Final = hashlib.blake2b(VDSO_IMAGE, digest_size=16).digest()
"""Of this kernel's vDSO as it stands in every process, patched for the CPU by the kernel."""
PACKED: Final = zlib.compress(VDSO_IMAGE, 9)
_MAX_CODE: Final = 1 << 20  # bytes; real ones have two pages

_PAGE: Final = 4096
_PROT_READ, _PROT_RX = 1, 5
_PRIVATE_ANONYMOUS: Final = 0x22
_NAME: Final = b"vdso"  # keeps the mapping from being merged with a neighbour, where the kernel has names
_MAGIC: Final = b"BPFSVDSO"
# magic, digest, then start and end of vvar and vvar_vclock (0: none), absolute. The last bytes of the relic's mapping.
_MARK: Final = struct.Struct("<8s16s4Q")
_SLOT: Final = 8  # bytes: its target, before the mark
_CALLS: Final = ("gettimeofday", "time", "clock_gettime", "clock_getres", "getcpu", "getrandom")
_ZEROS: Final = ("[vvar]", "[vvar_vclock]")
_CODE: Final = "[vdso]"

Layout = dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Relic:
    """Where a vDSO of another kernel is, or was.

    Attributes:
        digest: of the whole, untouched.
        layout: name -> (start, end), as in `/proc/PID/maps`.
    """

    digest: bytes
    layout: Layout

    @property
    def code(self) -> tuple[int, int]:
        """(start, end) of its code."""
        return self.layout[_CODE]

    def plain(self) -> list[Any]:
        """For the image."""
        return [self.digest, [[name, *span] for name, span in self.layout.items()]]

    @classmethod
    def of(cls, plain: list[Any]) -> "Relic":
        """Inverse of `plain`. Raises ImageError."""
        try:
            digest, layout = plain
            relic = cls(bytes(digest), {str(name): (int(start), int(end)) for name, start, end in layout})
            if _CODE not in relic.layout or not all(_is_span(*span) for span in relic.layout.values()):
                raise ImageError("a vDSO has no code")
        except (TypeError, ValueError) as error:
            raise ImageError(f"vDSO: {error}") from error
        return relic


def _is_span(start: int, end: int) -> bool:
    return 0 < start < end < 1 << 47 and end - start <= _MAX_CODE and (start | end) % _PAGE == 0


def find_relics(pid: int, vmas: Iterable[Vma]) -> list[Relic]:
    """The relics in a process, by their marks: one look at each executable mapping without a file."""
    found = []
    for vma in vmas:
        if vma.prot != _PROT_RX or vma.shared or (vma.path and vma.path != f"[anon:{_NAME.decode()}]"):
            continue
        try:
            magic, digest, *spans = _MARK.unpack(process_vm.read(pid, vma.end - _MARK.size, _MARK.size))
        except OSError:
            continue
        if magic == _MAGIC:
            zeros = {name: (spans[2 * i], spans[2 * i + 1]) for i, name in enumerate(_ZEROS) if spans[2 * i]}
            found.append(Relic(digest, {**zeros, _CODE: (vma.start, vma.end)}))
    return found


# ---- the destination -------------------------------------------------------------------------------------


class Foreign:
    """The rebuilding of a process whose kernel was another one.

    Args:
        image: gets the relic's mappings, and in `special` this kernel's own layout at a free place.
        own: the target's vvar and vDSO as they are now.
        taken: spans that must stay free besides.

    Raises:
        ImageError: the image's idea of its vDSO is none.
    """

    def __init__(self, image: Image, own: Layout, taken: list[tuple[int, int]]) -> None:
        self._image, self._own = image, own
        self._new = Relic.of([image.vdso, image.special])
        self._relics = [Relic.of(plain) for plain in image.relics]
        self._code = _unpack(image.vdso_code, self._new)
        for name, (start, end) in self._new.layout.items():
            prot = _PROT_RX if name == _CODE else _PROT_READ
            image.regions.append(Region(start, end, prot, _PRIVATE_ANONYMOUS, -1, 0, [], 0, _NAME, False))
        image.regions.sort(key=lambda region: region.start)
        place = _room([(r.start, r.end) for r in image.regions] + taken + list(own.values()), _extent(own))
        image.special = [[name, *span] for name, span in _moved(own, place).items()]

    def home(self) -> Layout | None:
        """Where this kernel's vDSO belongs, if the process once had it; the relic there is to be overwritten."""
        for relic in self._relics:
            if relic.digest == DIGEST and _shape(relic.layout) == _shape(self._own):
                self._relics.remove(relic)
                return relic.layout
        return None

    def check_frames(self, pid: int, stacks: Iterable[tuple[Registers, int]]) -> None:
        """Refuse where a thread, or the context under a signal handler, is inside the vDSO's code.

        Args:
            stacks: registers of a thread, and where the mapping of its stack ends.

        Raises:
            OSError: EAGAIN.
        """
        first, last = self._new.code
        for registers, end in stacks:
            inside = first <= registers.pc < last
            if inside or any(first <= pc < last for pc in _interrupted(pid, registers.stack, end)):
                raise OSError(11, "it is in the midst of reading a clock, which differs there: try again")

    def patch(self, pid: int, memory: int, vdso: int) -> None:
        """Point every relic at this kernel's vDSO, which is at `vdso` by now. Raises OSError, ImageError."""
        targets = {name: vdso + offset for name, offset, _ in symbols(VDSO_IMAGE)}
        process_vm.force_write(memory, self._new.code[0], patched(self._code, self._new, targets))
        for relic in self._relics:
            start, end = relic.code
            code = process_vm.read(pid, start, end - start)
            process_vm.force_write(memory, start, patched(code, relic, targets))


def _unpack(packed: bytes, relic: Relic) -> bytes:
    start, end = relic.code
    try:
        code = zlib.decompressobj().decompress(packed, _MAX_CODE)
    except zlib.error as error:
        raise ImageError(f"vDSO: {error}") from error
    if len(code) != end - start or hashlib.blake2b(code, digest_size=16).digest() != relic.digest:
        raise ImageError("its vDSO is another one than it says")
    return code


def _extent(layout: Layout) -> int:
    return max(end for _, end in layout.values()) - min(start for start, _ in layout.values())


def _shape(layout: Layout) -> dict[str, tuple[int, int]]:
    base = min(start for start, _ in layout.values())
    return {name: (start - base, end - base) for name, (start, end) in layout.items()}


def _moved(layout: Layout, place: int) -> Layout:
    return {name: (place + start, place + end) for name, (start, end) in _shape(layout).items()}


def _room(spans: list[tuple[int, int]], size: int) -> int:
    """A hole with a page to spare on both sides, above what programs usually map first."""
    at = 1 << 32
    for start, end in sorted(spans):
        if start >= at + size + _PAGE:
            break
        at = max(at, end + _PAGE)
    return at


FRAME_SCAN: Final = 256 << 10  # bytes of stack looked at: room for dozens of nested handlers


def _interrupted(pid: int, stack: int, end: int) -> Iterator[int]:
    """Program counters of the contexts that signal handlers on this stack will return to."""
    start = (stack + 7) & ~7
    length = min(end - start, FRAME_SCAN)
    if length < 24:
        return
    words = memoryview(process_vm.read(pid, start, length)[: length & ~7]).cast("Q")
    for i in range(len(words) - CONTEXT_WORDS + 1):
        if is_context(words, i):
            yield words[i]


# ---- code ------------------------------------------------------------------------------------------------


def symbols(code: bytes) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the functions that a vDSO exports. Raises ImageError when it is no ELF file of its kind.

    Offsets are of the image: a vDSO is linked at 0, and mapped as it is.
    """
    try:
        return list(_symbols(code))
    except (struct.error, IndexError, ValueError) as error:
        raise ImageError(f"vDSO: {error}") from error


def _symbols(code: bytes) -> Iterator[tuple[str, int, int]]:
    if code[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit ELF file")
    headers, size, count = struct.unpack_from("<Q", code, 32)[0], *struct.unpack_from("<HH", code, 54)
    tags: dict[int, int] = {}
    for i in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", code, headers + i * size)
        if kind == 2:  # PT_DYNAMIC
            for at in range(offset, offset + length, 16):
                tag, value = struct.unpack_from("<QQ", code, at)
                tags.setdefault(tag, value)
    texts, table = tags.get(5, 0), tags.get(6, 0)  # DT_STRTAB, DT_SYMTAB
    for at in range(table, table + 24 * _count(code, tags), 24):
        name, info, _, section, value, length = struct.unpack_from("<IBBHQQ", code, at)
        if info & 15 == 2 and section:  # STT_FUNC, defined here
            text = code[texts + name : code.index(b"\0", texts + name)]
            yield text.decode("ascii"), value, length


def _count(code: bytes, tags: dict[int, int]) -> int:
    """Symbols in the table: DT_HASH says it; where there is DT_GNU_HASH only, the table ends where the texts begin."""
    if 4 in tags:
        return int(struct.unpack_from("<I", code, tags[4] + 4)[0])
    return (tags[5] - tags[6]) // 24


def patched(code: bytes, relic: Relic, targets: dict[str, int]) -> bytes:
    """The relic's memory: each entry a jump through a slot behind the code, the mark at the end.

    Args:
        code: what is there now: the vDSO as it was, or a relic.
        targets: name -> address in the vDSO that answers.

    Raises:
        ImageError: no room is left behind the code, or an entry is too small.
    """
    data = bytearray(code)
    marked = code[-_MARK.size :].startswith(_MAGIC)
    entries: dict[int, tuple[str, int]] = {offset: (name, size) for name, offset, size in sorted(symbols(code))}
    slot = len(data) - _MARK.size - _SLOT * len(entries)
    if not marked and any(code[slot:]):
        raise ImageError("its vDSO has no room behind the code")
    for offset, (name, size) in sorted(entries.items()):
        jump = jump_by(slot, offset)
        call = name.removeprefix("__vdso_")
        if name in targets and size >= JUMP:
            data[offset : offset + JUMP] = jump
            data[slot : slot + _SLOT] = struct.pack("<Q", targets[name])
        elif data[offset : offset + JUMP] == jump and call in _CALLS:  # it led to a kernel that had this one
            data[offset : offset + 8] = call_and_return(NR[call])
        slot += _SLOT
    spans = [relic.layout.get(name, (0, 0)) for name in _ZEROS]
    data[-_MARK.size :] = _MARK.pack(_MAGIC, relic.digest, *spans[0], *spans[1])
    return bytes(data)
