"""A program of a small CPU comes to one with more registers: the C library's late binding has room for them."""

import os
import struct
from collections.abc import Callable

import pytest

from engine import binder, cpu, vdso
from engine.linux import process_vm, procfs
from engine.zygote import Zygote
from tests.engine.moves import Mover, Victim
from tests.engine.test_kernels import lacking
from tests.engine.test_moves import CLD_EXITED, ended

# glibc's _dl_runtime_resolve_xsave on a CPU that has no XSAVEC (GLIBC_TUNABLES, gnu.org/software/libc/manual).
SMALL = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-XSAVEC"}


def resolvers(pid: int) -> list[binder.Resolver]:
    maps = procfs.parse_maps(procfs.read(f"/proc/{pid}/maps"))
    return binder.find(pid, [vma.start for vma in maps if vma.path.startswith("/") and not vma.offset])


def size(pid: int, resolver: binder.Resolver) -> int:
    return int.from_bytes(process_vm.read(pid, resolver.size_at, 8), "little")


@pytest.mark.parametrize("environment", [SMALL, {}], ids=["xsave", "xsavec"])
def test_the_buffer_of_late_binding_grows(
    mover: Mover, victim: Callable[..., Victim], environment: dict[str, str]
) -> None:
    if 7 not in cpu.here().parts:
        pytest.skip("needs a CPU with AVX-512")
    poor = lacking()
    one = victim("lazy", env=os.environ | environment)
    found = resolvers(one.pid)
    if not found:
        pytest.skip("the C library binds at once, or by FXSAVE")
    (resolver,) = found
    memory = os.open(f"/proc/{one.pid}/mem", os.O_RDWR)
    process_vm.force_write(memory, resolver.size_at, struct.pack("<Q", resolver.need(poor)))  # as it starts there
    os.close(memory)
    patch = pytest.MonkeyPatch()
    patch.setattr(cpu, "here", lambda: poor)
    patch.setattr(cpu, "packed", lambda: vdso.zlib.compress(cpu.msgpack.packb(poor.plain())))
    zygote = Zygote.start()
    patch.undo()
    try:
        there = Mover(zygote, mover.space)
        hostpid = there.away(one.pid, one.output.fileno(), to=mover)
        there.close()
    finally:
        zygote.close()
    assert size(hostpid, resolver) == resolver.need(cpu.here()) > resolver.need(poor)
    one.stop()
    assert ended(mover, one.pid) == (CLD_EXITED, 0), one.text()


def test_who_is_bound_at_once_has_no_resolver(victim: Callable[..., Victim]) -> None:
    one = victim("lazy", env=os.environ | {"LD_BIND_NOW": "1"})
    assert resolvers(one.pid) == []


def test_resolvers_that_are_not_known_are_refused() -> None:
    with pytest.raises(OSError, match="LD_BIND_NOW=1"):
        binder.decode(0x1000, bytes(160))
    assert binder.decode(0x1000, b"\x0f\xae\x44\x24\x40" + bytes(155)) is None
