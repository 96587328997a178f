"""What a CPU has that a program may have seen, what another lacks of it, and vector state moved between their layouts.

A program chooses its instructions when it starts: another CPU must have them all. Two families are so rarely used
by those who see them that use decides, as the CPU tracks it (XINUSE, which XSAVE writes to XSTATE_BV): AVX-512 and
AMX. A thread that has not touched their registers may go to a node that lacks them.
"""

import struct
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgpack

from engine.linux import cpuid

# Names of /proc/cpuinfo of what programs (and the compilers' and C library's choosers) execute outside of the kernel.
_WORDS: Final = (
    "sse2 pni ssse3 sse4_1 sse4_2 sse4a popcnt cx16 lahf_lm movbe abm f16c fma fma4 xop tbm bmi1 bmi2 avx avx2 "
    "avx_vnni avx_ifma avx_vnni_int8 avx_ne_convert aes vaes pclmulqdq vpclmulqdq gfni sha_ni sha512 sm3 sm4 "
    "rdrand rdseed adx rdtscp rdpid clflushopt clwb cldemote movdiri movdir64b enqcmd serialize waitpkg xsave "
    "xsavec xgetbv1 fsgsbase 3dnowprefetch prefetchwt1 erms fsrm rtm hle cmpccxadd raoint user_shstk ibt pku"
)
_FLAGS: Final = frozenset(_WORDS.split())
_AVX512: Final = "avx512"
_AMX: Final = "amx"
_USES: Final = {_AVX512: 0xE0, _AMX: 3 << 17}  # XSTATE_BV bits of opmask, ZMM_Hi256, Hi16_ZMM; XTILECFG, XTILEDATA
_NAMES: Final = {2: "AVX", 3: "MPX", 4: "MPX", 5: "AVX-512", 6: "AVX-512", 7: "AVX-512", 9: "PKRU", 17: "AMX",
                 18: "AMX", 19: "APX"}  # fmt: skip
_PKRU: Final = 1 << 9  # always "in use" under Linux; who has protection keys is refused anyway
_LEGACY: Final = 576  # bytes: FXSAVE area and XSAVE header, the same everywhere
_HEADER: Final = 512
_XSAVE_LEAF: Final = 13
_MAX_PLAIN: Final = 1 << 16  # bytes of a description


@dataclass(frozen=True, slots=True)
class Cpu:
    """A kind of CPU under its kernel.

    Attributes:
        flags: of `/proc/cpuinfo`, as far as programs use them.
        xcr0: the enabled state components.
        parts: component -> (offset, size) in a standard-format XSAVE area.
    """

    flags: frozenset[str]
    xcr0: int
    parts: dict[int, tuple[int, int]]

    @property
    def area(self) -> int:
        """Bytes of an XSAVE area."""
        return max([_LEGACY, *(offset + size for offset, size in self.parts.values())])

    def plain(self) -> list[Any]:
        """For messages."""
        return [sorted(self.flags), self.xcr0, [[part, *place] for part, place in sorted(self.parts.items())]]

    @classmethod
    def of(cls, plain: list[Any]) -> "Cpu":
        """Inverse of `plain`. Raises ValueError, TypeError."""
        flags, xcr0, parts = plain
        return cls(frozenset(map(str, flags)), int(xcr0), {int(n): (int(at), int(size)) for n, at, size in parts})


@cache
def here() -> Cpu:
    """This machine's."""
    words: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            words = set(line.split(":", 1)[1].split())
            break
    flags = frozenset(word for word in words if word in _FLAGS or word.startswith((_AVX512, _AMX)))
    if "xsave" not in flags:
        return Cpu(flags, 3, {})
    xcr0 = cpuid.xcr0()
    parts = {}
    for part in range(2, 63):
        if xcr0 >> part & 1:
            size, offset, *_ = cpuid.cpuid(_XSAVE_LEAF, part)
            parts[part] = (offset, size)
    return Cpu(flags, xcr0, parts)


@cache
def packed() -> bytes:
    """This machine's for an image: two of a kind are equal byte by byte."""
    return zlib.compress(msgpack.packb(here().plain()), 9)


def unpack(data: bytes) -> Cpu:
    """Inverse of `packed`. Raises ValueError."""
    try:
        return Cpu.of(msgpack.unpackb(zlib.decompressobj().decompress(data, _MAX_PLAIN)))
    except (TypeError, zlib.error, msgpack.UnpackException) as error:
        raise ValueError(f"no CPU: {error}") from error


def used(xstate: bytes) -> int:
    """XSTATE_BV of an XSAVE area: the components that are not in their initial state."""
    value: int = struct.unpack_from("<Q", xstate, _HEADER)[0] if len(xstate) >= _LEGACY else 3
    return value & ~_PKRU


def missing(source: Cpu, target: Cpu, in_use: int) -> list[str]:
    """What a process of `source` with these components in use lacks at `target`, in names; empty when it may go."""
    lacks = sorted(source.flags - target.flags)
    for family, bits in _USES.items():
        if not in_use & bits:
            lacks = [name for name in lacks if not name.startswith(family)]
    return lacks


def sentence(lacks: list[str]) -> str:
    """Why a process cannot go there."""
    return f"the CPU there lacks what it may use: {', '.join(lacks)}"


def convert(xstate: bytes, source: dict[int, tuple[int, int]], target: Cpu) -> bytes:
    """An XSAVE area as another CPU lays it out.

    Args:
        source: component -> (offset, size) where it comes from.

    Raises:
        ValueError: a component that is in use is not there.
    """
    in_use = used(xstate)
    area = bytearray(target.area)
    head = xstate[:_LEGACY]
    area[: len(head)] = head
    for part, (offset, size) in source.items():
        content = xstate[offset : offset + size]
        if not in_use >> part & 1 or not any(content):  # zero is the initial state of all but PKRU
            in_use &= ~(1 << part)
        elif part not in target.parts:
            raise ValueError(f"it uses {_NAMES.get(part, part)} registers, which do not exist on this CPU")
        else:
            at, room = target.parts[part]
            if room != size:
                raise ValueError(f"the {_NAMES.get(part, part)} registers have another size on this CPU")
            area[at : at + size] = content
    struct.pack_into("<Q", area, _HEADER, in_use & (target.xcr0 | 3))
    return bytes(area)
