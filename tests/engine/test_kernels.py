"""Moves between kernels that differ: a zygote whose workers believe in another vDSO stands for the other kernel."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import cpu, state, vdso
from engine.jobspace import JobSpace
from engine.linux import pagemap, procfs
from engine.zygote import Zygote
from tests.engine.moves import Mover, Refused, Victim, until
from tests.engine.test_moves import CLD_EXITED, ended

TRIES = 60
"""Attempts at a move that a clock call in a signal handler may put off."""


@pytest.fixture(scope="module")
def foreign() -> Iterator[Zygote]:
    """A zygote on another kernel, as far as it knows: its code differs in a byte that nobody executes."""
    patch = pytest.MonkeyPatch()
    code = bytearray(vdso.VDSO_IMAGE)
    code[9] = 1  # padding of the ELF header's identification
    patch.setattr(vdso, "DIGEST", hashlib.blake2b(code, digest_size=16).digest())
    patch.setattr(vdso, "PACKED", vdso.zlib.compress(bytes(code)))
    zygote = Zygote.start()
    patch.undo()
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def older() -> Iterator[Zygote]:
    """A zygote without what came after Linux 6.1: PAGEMAP_SCAN, and timers with numbers of one's choice."""
    patch = pytest.MonkeyPatch()

    def no_scan(*_: int) -> list[tuple[int, int]]:
        raise pagemap.NoScan(errno.ENOTTY, "no PAGEMAP_SCAN")

    patch.setattr(pagemap, "_scan", no_scan)
    patch.setattr(state, "PR_TIMER_CREATE_RESTORE_IDS", 0x7FFF)
    zygote = Zygote.start()
    patch.undo()
    yield zygote
    zygote.close()


@pytest.fixture
def there(foreign: Zygote) -> Iterator[Mover]:
    """A node under the other kernel."""
    space = JobSpace.start(range(110_000, 120_000))
    mover = Mover(foreign, space)
    yield mover
    mover.close()
    space.close()


@pytest.fixture
def third(zygote: Zygote) -> Iterator[Mover]:
    """Another node under this kernel."""
    space = JobSpace.start(range(120_000, 130_000))
    mover = Mover(zygote, space)
    yield mover
    mover.close()
    space.close()


def move(source: Mover, target: Mover, pid: int, stdio: int) -> int:
    """Try until it is not in the midst of a clock call under a signal handler."""
    for attempt in range(TRIES):
        try:
            there = {"kernel": source.zygote is not target.zygote}
            hostpid = source.away(pid, stdio, to=target, unlike=there)
            target.space.read_reports()  # of an end that was a departure
            return hostpid
        except Refused as refused:
            assert refused.errno == 11 and attempt < TRIES - 1, refused.text
    raise AssertionError


def works(hostpid: int) -> None:
    """Wait until it has used some of the CPU."""

    def ticks() -> int:
        return int(Path(f"/proc/{hostpid}/stat").read_text().rpartition(")")[2].split()[11])

    before = ticks()
    until(lambda: ticks() > before + 1, "its work to go on")


def spans(hostpid: int) -> dict[str, str]:
    """Name -> span of its vDSO and vvar."""
    lines = Path(f"/proc/{hostpid}/maps").read_text().splitlines()
    return {line.split()[-1]: line.split()[0] for line in lines if line.split()[-1] in ("[vdso]", "[vvar]")}


def test_clocks_go_on_under_another_kernel_and_back_again(
    mover: Mover, there: Mover, third: Mover, victim: Callable[..., Victim]
) -> None:
    one = victim("clocks")
    before = spans(one.pid)
    at = move(mover, there, one.pid, one.output.fileno())
    assert spans(at) != before
    away = spans(at)
    works(at)
    for _ in range(2):
        at = move(there, mover, at, one.output.fileno())
        assert spans(at) == before, "the real vDSO is back in its place"
        works(at)
        at = move(mover, third, at, one.output.fileno())  # within a kernel nothing changes
        assert spans(at) == before
        at = move(third, there, at, one.output.fileno())
        assert spans(at) == away
        works(at)
    at = move(there, mover, at, one.output.fileno())
    one.stop()
    assert ended(mover, one.pid) == (CLD_EXITED, 0), one.text()


@pytest.mark.parametrize("name", ["memory-static", "signals"])
def test_victim_finds_everything_under_another_kernel(
    mover: Mover, there: Mover, victim: Callable[..., Victim], name: str
) -> None:
    one = victim(name)
    at = move(mover, there, one.pid, one.output.fileno())
    move(there, mover, at, one.output.fileno())
    one.stop()
    assert ended(mover, one.pid) == (CLD_EXITED, 0), one.text()


@pytest.mark.parametrize("name", ["memory", "memory-static", "state", "threads"])
def test_victim_finds_everything_without_newer_calls(
    older: Zygote, space: JobSpace, mover: Mover, victim: Callable[..., Victim], name: str
) -> None:
    one = victim(name, *{"state": ["root"], "threads": ["3"]}.get(name, []))
    old = Mover(older, space)
    old.away(one.pid, one.output.fileno())
    old.close()
    space.read_reports()
    one.stop()
    assert ended(mover, one.pid) == (CLD_EXITED, 0), one.text()


def test_entries_find_what_the_scan_finds() -> None:
    memory = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, 1, 7, 4096, 4097, 9000):
        memory[page * 4096] = 1
    assert memory[100 * 4096] == 0  # the zero page
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        scanned = pagemap.private_runs(file.fileno(), start, start + (64 << 20))
        read = pagemap.private_entries(file.fileno(), start, start + (64 << 20))
        assert read == scanned
    assert any(first <= start < last for first, last in procfs.touched(Path("/proc/self/smaps").read_bytes()))


def test_entries_that_the_next_kernel_lacks_become_system_calls() -> None:
    code = vdso.VDSO_IMAGE
    relic = vdso.Relic(vdso.DIGEST, {"[vvar]": (0x10000, 0x14000), "[vdso]": (0x14000, 0x14000 + len(code))})
    every = {name: 0x7000_0000 + offset for name, offset, _ in vdso.symbols(code)}
    entries = {name: offset for name, offset, _ in vdso.symbols(code)}
    once = vdso.patched(code, relic, every)
    at = entries["__vdso_time"]
    assert once[at : at + 2] == b"\xff\x25"
    slot = at + 6 + int.from_bytes(once[at + 2 : at + 6], "little", signed=True)
    assert int.from_bytes(once[slot : slot + 8], "little") == every["__vdso_time"]
    fewer = {name: address for name, address in every.items() if "time" not in name or "clock" in name}
    again = vdso.patched(once, relic, fewer)
    assert again[at : at + 8] == b"\xb8\xc9\0\0\0\x0f\x05\xc3"  # mov $201, %eax; syscall; ret
    never = vdso.patched(code, relic, fewer)
    assert never[at : at + 8] == code[at : at + 8]  # over zero pages the old code falls back by itself


def test_vector_state_survives_another_layout() -> None:
    own = cpu.here()
    area = bytearray(own.area)
    in_use = own.xcr0 & ~(1 << 9)
    area[:512] = bytes(i % 251 for i in range(512))
    area[512:520] = in_use.to_bytes(8, "little")
    for part, (offset, size) in own.parts.items():
        area[offset : offset + size] = bytes((part + i) % 253 for i in range(size))
    shifted = cpu.Cpu(own.flags, own.xcr0, {n: (at + 64, size) for n, (at, size) in own.parts.items()})
    there = cpu.convert(bytes(area), own.parts, shifted)
    assert len(there) == shifted.area
    assert cpu.convert(there, shifted.parts, own) == bytes(area)
    if 5 in own.parts:
        with pytest.raises(ValueError, match="AVX-512 registers"):
            cpu.convert(bytes(area), own.parts, lacking())
    # A CPU that marks all components, whatever is in them (an emulator does).
    area[576:] = bytes(len(area) - 576)
    assert cpu.used(cpu.convert(bytes(area), own.parts, lacking())) & ~3 == 0


def lacking(*names: str) -> cpu.Cpu:
    """This CPU without some of its instructions, and without the registers of AVX-512 and AMX."""
    own = cpu.here()
    flags = frozenset(flag for flag in own.flags if not flag.startswith(("avx512", "amx", *names)))
    parts = {part: place for part, place in own.parts.items() if part not in (5, 6, 7, 17, 18)}
    return cpu.Cpu(flags, own.xcr0 & ~0x600E0, parts)


def test_only_used_registers_count() -> None:
    own = cpu.here()
    if "avx512f" not in own.flags:
        pytest.skip("needs a CPU with AVX-512")
    poor = lacking()
    assert cpu.missing(own, poor, 7) == []
    assert "avx512f" in cpu.missing(own, poor, 0xE7)
    assert cpu.missing(own, lacking("avx2", "sha_ni"), 7) == ["avx2", "sha_ni"]


@pytest.mark.parametrize("told", [True, False], ids=["before", "by the destination"])
def test_cpu_that_lacks_what_it_uses_is_named(mover: Mover, victim: Callable[..., Victim], told: bool) -> None:
    one = victim("fpu")
    poor = lacking("popcnt")
    patch = pytest.MonkeyPatch()
    patch.setattr(cpu, "here", lambda: poor)
    patch.setattr(cpu, "packed", lambda: vdso.zlib.compress(cpu.msgpack.packb(poor.plain())))
    zygote, packed = Zygote.start(), cpu.packed()
    patch.undo()
    try:
        there = Mover(zygote, mover.space)
        with pytest.raises(Refused, match=r"the CPU there lacks what it may use: .*popcnt"):
            mover.away(one.pid, one.output.fileno(), to=there, unlike={"cpu": packed} if told else {})
        there.close()
    finally:
        zygote.close()
    hostpid = mover.away(one.pid, one.output.fileno())
    mover.space.read_reports()
    os.kill(hostpid, signal.SIGUSR1)
    assert ended(mover, one.pid) == (CLD_EXITED, 0), one.text()
