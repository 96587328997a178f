"""The C library's late binding on a CPU that saves more registers than the one where the program started.

A library's function that is called for the first time goes by way of `_dl_runtime_resolve` (glibc,
sysdeps/x86_64/dl-trampoline.h). It saves the vector registers by XSAVE or XSAVEC into a buffer on the stack whose size
was asked of the CPU when the program started. On a CPU with more state components the instruction writes beyond it. So
the size, a variable of the dynamic loader, is raised here. Objects that were bound at once (LD_BIND_NOW, -z now) have
no such way, and neither has a program that saves by FXSAVE.
"""

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from engine.cpu import Cpu
from engine.linux import process_vm

_PT_LOAD: Final = 1
_PT_DYNAMIC: Final = 2
_DT_PLTGOT: Final = 3
_RESOLVER_SLOT: Final = 16  # in the table at DT_PLTGOT: the address where late binding begins, 0 without it
_PAGE_MASK: Final = ~0xFFF
_LOOK: Final = 160  # bytes of the resolver's code up to its saving instruction
_STEP: Final = 64  # the size is a multiple
_ROOM: Final = range(512, 1 << 20, _STEP)  # sizes that make sense
_SUB: Final = b"\x48\x2b\x25"  # sub SIZE(%rip),%rsp
_MASK: Final = b"\xb8"  # mov $MASK,%eax, right before %edx is cleared
_CLEAR: Final = b"\x31\xd2"
_SAVES: Final = (b"\x0f\xae\x64\x24", b"\x0f\xc7\x64\x24")  # xsave, xsavec disp8(%rsp)
_FXSAVE: Final = b"\x0f\xae\x44\x24"


@dataclass(frozen=True, slots=True)
class Resolver:
    """One way of late binding.

    Attributes:
        start, saves: addresses of its first and of its saving instruction.
        size_at: address of the variable with its buffer's bytes.
        offset: of the XSAVE area in the buffer.
        mask: the state components that it saves.
    """

    start: int
    saves: int
    size_at: int
    offset: int
    mask: int

    def need(self, cpu: Cpu) -> int:
        """Bytes of buffer that it needs on a CPU; the compacted format is never longer than the standard one."""
        ends = [at + size for part, (at, size) in cpu.parts.items() if self.mask >> part & 1]
        return -(-(self.offset + max([576, *ends])) // _STEP) * _STEP


def widen(pid: int, memory: int, objects: Iterable[int], running: Iterable[int], cpu: Cpu) -> None:
    """Give every resolver of a stopped process the room that it needs.

    Args:
        memory: descriptor of its /proc/PID/mem.
        objects: addresses where files are mapped from their beginning.
        running: where its threads are.
        cpu: where it is going to run.

    Raises:
        OSError: EOPNOTSUPP, its resolver is unknown to us; EAGAIN, a thread is inside of one.
    """
    for start in sorted(set(_starts(pid, objects))):
        resolver = decode(start, process_vm.read(pid, start, _LOOK))
        if resolver is None:
            continue
        size, need = _number(pid, resolver.size_at), resolver.need(cpu)
        if size not in _ROOM:
            raise _unknown()
        if size >= need:
            continue
        if any(resolver.start <= at <= resolver.saves for at in running):
            raise OSError(errno.EAGAIN, "it is binding a function at this moment: try again")
        process_vm.force_write(memory, resolver.size_at, struct.pack("<Q", need))


def find(pid: int, objects: Iterable[int]) -> list[Resolver]:
    """The resolvers of a process. Raises OSError."""
    found = (decode(start, process_vm.read(pid, start, _LOOK)) for start in sorted(set(_starts(pid, objects))))
    return [resolver for resolver in found if resolver]


def decode(start: int, code: bytes) -> Resolver | None:
    """Take a resolver's code apart; None for one that saves what every CPU has.

    Raises:
        OSError: EOPNOTSUPP, it is none that we know.
    """
    saves = min((at for op in (*_SAVES, _FXSAVE) if (at := code.find(op)) >= 0), default=-1)
    if saves >= 0 and code.startswith(_FXSAVE, saves):
        return None
    sub, clear = code.find(_SUB, 0, max(saves, 0)), code.find(_CLEAR, 0, max(saves, 0))
    if sub < 0 or clear < 5 or code[clear - 5 : clear - 4] != _MASK:
        raise _unknown()
    (distance,) = struct.unpack_from("<i", code, sub + 3)
    (mask,) = struct.unpack_from("<I", code, clear - 4)
    return Resolver(start, start + saves, start + sub + 7 + distance, code[saves + 4], mask)


def _unknown() -> OSError:
    text = "its C library binds functions late in a way that is not known on this CPU: start it with LD_BIND_NOW=1"
    return OSError(errno.EOPNOTSUPP, text)


def _starts(pid: int, objects: Iterable[int]) -> Iterator[int]:
    for at in objects:
        try:
            table = _table(pid, at)
            start = _number(pid, table + _RESOLVER_SLOT) if table else 0
        except (OSError, struct.error):
            continue  # no program, or one that may not be read: nothing was bound in it
        if start:
            yield start


def _table(pid: int, at: int) -> int:
    """Address of an ELF object's DT_PLTGOT; 0 where there is none."""
    head = process_vm.read(pid, at, 64)
    if head[:6] != b"\x7fELF\x02\x01":
        return 0
    headers, size, count = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
    raw = process_vm.read(pid, at + headers, size * count)
    base, dynamic = None, (0, 0)
    for i in range(count):
        kind, _, _, address, _, _, length = struct.unpack_from("<IIQQQQQ", raw, i * size)
        if kind == _PT_LOAD and base is None:
            base = at - (address & _PAGE_MASK)
        elif kind == _PT_DYNAMIC:
            dynamic = (address, length)
    if base is None or not dynamic[1]:
        return 0
    raw = process_vm.read(pid, base + dynamic[0], dynamic[1])
    for tag, value in struct.iter_unpack("<QQ", raw[: len(raw) & ~15]):
        if tag == _DT_PLTGOT:
            return int(value if value >= base else base + value)  # the loader has added the base, or not
    return 0


def _number(pid: int, at: int) -> int:
    data = process_vm.read(pid, at, 8)
    if len(data) < 8:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT), f"memory of process {pid}")
    return int.from_bytes(data, "little")
