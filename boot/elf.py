"""The little of ELF that images need: which libraries an object wants, what a kernel module says of itself, and an
object without its debugging information.

Format: elf(5). 64 bit, little endian: x86_64.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_DYNAMIC = struct.Struct("<qQ")

_LOAD, _INTERP = 1, 3
_NEEDED, _STRTAB, _RPATH, _RUNPATH = 1, 5, 15, 29


class NotElf(ValueError):
    """It is no ELF object for this architecture, or a damaged one."""


class Elf:
    """One object.

    Args:
        data: all of the file.

    Raises:
        NotElf: it is none.
    """

    def __init__(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise NotElf("is no 64-bit ELF object")
        self._data = data
        try:
            self._head = _HEADER.unpack_from(data)
            self._segments = [
                _SEGMENT.unpack_from(data, self._head[5] + number * self._head[9]) for number in range(self._head[10])
            ]
        except struct.error:
            raise NotElf("is a damaged ELF object") from None

    @property
    def interpreter(self) -> str | None:
        """The dynamic loader that a program asks for."""
        for kind, _, offset, _, _, size, _, _ in self._segments:
            if kind == _INTERP:
                return self._data[offset : offset + size].rstrip(b"\0").decode()
        return None

    def needed(self) -> tuple[list[str], list[str]]:
        """Names of the libraries it wants, and folders where it wants them looked for first ($ORIGIN not expanded)."""
        entries = list(self._dynamic())
        strings = next((self._offset(value) for tag, value in entries if tag == _STRTAB), 0)
        names = [self._string(strings + value) for tag, value in entries if tag == _NEEDED]
        folders = [self._string(strings + value) for tag, value in entries if tag in (_RPATH, _RUNPATH)]
        return names, [folder for text in folders for folder in text.split(":") if folder]

    def section(self, wanted: str) -> bytes:
        """The content of a section; empty where it has none of the name."""
        _, _, _, _, _, _, table, _, _, _, _, size, count, names = self._head
        sections = [_SECTION.unpack_from(self._data, table + number * size) for number in range(count)]
        if not sections:
            return b""
        for name, _, _, _, offset, length, *_ in sections:
            if self._string(sections[names][4] + name) == wanted:
                return self._data[offset : offset + length]
        return b""

    def loadable(self) -> bytes:
        """What the loader maps, and nothing behind it: no section table, symbols, or debugging information.

        The same as strip(1) for a program or shared library, without binutils. Not for kernel modules, whose sections
        count.
        """
        end = max(offset + size for _, _, offset, _, _, size, _, _ in self._segments)
        end = max(end, self._head[5] + self._head[9] * self._head[10])
        head = list(self._head)
        head[6] = head[12] = head[13] = 0  # e_shoff, e_shnum, e_shstrndx
        return _HEADER.pack(*head) + self._data[_HEADER.size : end]

    def _dynamic(self) -> Iterator[tuple[int, int]]:
        for kind, _, offset, _, _, size, _, _ in self._segments:
            if kind == 2:  # PT_DYNAMIC
                for tag, value in _DYNAMIC.iter_unpack(self._data[offset : offset + size // 16 * 16]):
                    if tag == 0:
                        return
                    yield tag, value

    def _offset(self, address: int) -> int:
        for kind, _, offset, virtual, _, size, _, _ in self._segments:
            if kind == _LOAD and virtual <= address < virtual + size:
                return int(offset + address - virtual)
        raise NotElf("has an address outside of its segments")

    def _string(self, offset: int) -> str:
        return self._data[offset : self._data.index(b"\0", offset)].decode(errors="replace")
