"""What goes ahead of a move: sets of addresses, the record of writes, and what is believed of the other side."""

import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator

import msgpack
import pytest

from engine import spans
from engine.foresight import Recheck, still_said
from engine.freeze import freeze
from engine.image import ImageError
from engine.linux import procfs, userfaultfd
from engine.mending import mend
from engine.precopy import Layout
from engine.staging import NORESERVE, PLAIN, Keep
from engine.tracking import Unwatchable, begin, is_plain
from tests.engine.moves import Mover

PAGE = 4096

needs_record = pytest.mark.skipif(
    not userfaultfd.works(), reason="this kernel keeps no record of writes (userfaultfd WP_ASYNC)"
)


def test_sets_of_addresses() -> None:
    chance = random.Random(7)

    def some() -> tuple[spans.Spans, set[int]]:
        parts = [(a, a + chance.randint(1, 9)) for a in chance.sample(range(100), chance.randint(0, 12))]
        return spans.merge(parts), {x for start, end in parts for x in range(start, end)}

    def members(found: spans.Spans) -> set[int]:
        assert found == sorted(found)
        assert all(start < end for start, end in found)
        return {x for start, end in found for x in range(start, end)}

    for _ in range(300):
        (one, its), (other, theirs) = some(), some()
        assert members(one) == its
        assert spans.size(one) == len(its)
        assert members(spans.both(one, other)) == its & theirs
        assert members(spans.without(one, other)) == its - theirs
        start = chance.randint(0, 100)
        hit = spans.overlapping(one, start, start + 5)
        assert hit == [span for span in one if span[0] < start + 5 and start < span[1]]


def test_a_mapping_goes_on_with_one_span_or_begins_anew() -> None:
    layout = Layout()
    drop, make, fresh = layout.plan([(0x10000, 0x20000, PLAIN)])
    assert (drop, make[PLAIN], fresh) == ([], [(0x10000, 0x20000)], [(0x10000, 0x20000)])
    layout.apply(drop, make, [])
    # It has grown at both ends.
    drop, make, fresh = layout.plan([(0x8000, 0x30000, PLAIN)])
    assert (drop, make[PLAIN], fresh) == ([], [(0x8000, 0x10000), (0x20000, 0x30000)], [])
    layout.apply(drop, make, [])
    # Of another kind now.
    drop, make, fresh = layout.plan([(0x10000, 0x20000, PLAIN | NORESERVE)])
    assert (drop, make[PLAIN | NORESERVE], len(fresh)) == ([(0x10000, 0x20000)], [(0x10000, 0x20000)], 1)
    layout.apply(drop, make, [(0x10000, 0x20000)])
    assert layout.all == [(0x8000, 0x10000), (0x20000, 0x30000)]
    # Two spans with a hole between them would not become one mapping.
    drop, make, fresh = layout.plan([(0x8000, 0x30000, PLAIN)])
    assert (drop, make[PLAIN], len(fresh)) == (layout.all, [(0x8000, 0x30000)], 1)


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", msgpack.packb([]), msgpack.packb([[], 3]), msgpack.packb([[[1, 2]], []]),
     msgpack.packb([[[0x2000, 0x1000]], []]), msgpack.packb([[[0, 1 << 48]], []]), msgpack.packb([[["a", "b"]], []]),
     msgpack.packb([[[0, 0x2000], [0x1000, 0x3000]], []])],
)  # fmt: skip
def test_a_bad_word_from_the_source_is_refused(body: bytes) -> None:
    with pytest.raises(ImageError):
        Keep.unpacked(body)


# Says where its memory is, then does what each line says with it.
TOY = """
import ctypes, mmap, sys
m = mmap.mmap(-1, 64 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for i in range(64): m[i * 4096] = 1
print(ctypes.addressof(ctypes.c_char.from_buffer(m)), flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Toy:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", TOY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.base = int(self.process.stdout.readline())

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def do(self, line: str) -> None:
        self.say(line)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "done\n"

    def watched(self) -> list[procfs.Vma]:
        vmas = procfs.parse_smaps(procfs.read(f"/proc/{self.process.pid}/smaps"))
        return [vma for vma in vmas if "uw" in vma.flags]


@pytest.fixture
def toy() -> Iterator[Toy]:
    one = Toy()
    yield one
    one.process.kill()
    one.process.communicate()


def pages(toy: Toy, found: spans.Spans) -> list[int]:
    inside = spans.both(found, [(toy.base, toy.base + 64 * PAGE)])
    return [(page - toy.base) // PAGE for start, end in inside for page in range(start, end, PAGE)]


@needs_record
def test_the_record_of_writes(toy: Toy) -> None:
    descriptors = os.listdir(f"/proc/{toy.process.pid}/fd")
    watch = begin(toy.process.pid)
    try:
        assert os.listdir(f"/proc/{toy.process.pid}/fd") == descriptors
        assert toy.watched()
        span = next((vma.start, vma.end) for vma in toy.watched() if vma.start <= toy.base < vma.end)
        assert pages(toy, watch.take(span)) == list(range(64))
        assert pages(toy, watch.take(span)) == []
        toy.do("m[5 * 4096] = 2; m[9 * 4096] = 3")
        toy.do("import os; pid = os.fork(); pid or os._exit(0); os.waitpid(pid, 0)")
        assert pages(toy, watch.take(span)) == [5, 9]
        toy.do("m.madvise(mmap.MADV_DONTNEED, 20 * 4096, 2 * 4096)")
        assert pages(toy, watch.present(span)) == [*range(20), *range(22, 64)]
        toy.do("m[20 * 4096] = 1")
        assert pages(toy, watch.take(span)) == [20]
    finally:
        watch.close()
    assert not toy.watched()


@needs_record
def test_writes_that_nobody_would_see_are_not_recorded(toy: Toy, tmp_path: object) -> None:
    toy.do(f"import os; fd = os.open({str(tmp_path)!r} + '/x', os.O_CREAT | os.O_RDWR | os.O_DIRECT)")
    with pytest.raises(Unwatchable, match="O_DIRECT"):
        begin(toy.process.pid)
    assert not toy.watched()


# Two pieces with pages of their own, then the gap between them: 48 pages, which the kernel keeps as two mappings.
IN_PIECES = """
c = ctypes.CDLL(None, use_errno=True); c.mmap.restype = c.mremap.restype = ctypes.c_void_p
at = c.mmap(ctypes.c_void_p(0), 512 * 4096, 0, 0x22, -1, 0) + 256 * 4096
def piece(first, count):
    assert c.mmap(ctypes.c_void_p(at + first * 4096), count * 4096, 3, 0x32, -1, 0) == at + first * 4096
def byte(page): return ctypes.c_ubyte.from_address(at + page * 4096)
piece(0, 16); byte(0).value = 1; byte(15).value = 2
piece(32, 16); byte(32).value = 3
piece(16, 16); byte(16).value = 4
print(at, flush=True)
"""
GROWN = """
new = c.mremap(ctypes.c_void_p(at), ctypes.c_size_t(48 * 4096), ctypes.c_size_t(700 * 4096), 1)
assert new not in (None, 2**64 - 1), ctypes.get_errno()
at = new
assert [byte(n).value for n in (0, 1, 15, 16, 32, 47, 699)] == [1, 0, 2, 4, 3, 0, 0]
"""


def test_memory_in_pieces_is_made_one_mapping(toy: Toy) -> None:
    assert toy.process.stdout is not None
    toy.say(f"exec({IN_PIECES!r}, globals())")
    at = int(toy.process.stdout.readline())
    assert toy.process.stdout.readline() == "done\n"
    span = (at, at + 48 * PAGE)

    def mappings() -> int:
        vmas = procfs.parse_maps(procfs.read(f"/proc/{toy.process.pid}/maps"))
        return sum(vma.start < span[1] and vma.end > span[0] for vma in vmas)

    assert mappings() == 2
    frozen = freeze(toy.process.pid)
    try:
        injection = frozen.open_injection()
        assert mend(injection, [(*span, PLAIN)]) == 1
        assert mend(injection, [(*span, PLAIN)]) == 0
    finally:
        frozen.release()
    assert mappings() == 1
    toy.do(f"exec({GROWN!r}, globals())")


# MAP_NORESERVE, of a kind that no neighbour has, so that all of it is one mapping.
APART = "n = mmap.mmap(-1, 2 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000); n.write(b'x' * 8192)"
NO_FORK = "n.madvise(mmap.MADV_DONTFORK)"


def advised(pid: int) -> list[int]:
    """The sizes of mappings that no child is to have."""
    vmas = procfs.parse_smaps(procfs.read(f"/proc/{pid}/smaps"))
    return [vma.end - vma.start for vma in vmas if "dc" in vma.flags]


def test_what_maps_does_not_tell_is_looked_at_again(toy: Toy) -> None:
    toy.do(APART)
    before = procfs.read(f"/proc/{toy.process.pid}/smaps")
    toy.do("n[5] = 1")
    same = procfs.read(f"/proc/{toy.process.pid}/smaps")
    toy.do(NO_FORK)
    frozen = freeze(toy.process.pid)
    try:
        assert still_said(frozen, before) == before, "maps shows advice by now"
        assert not Recheck(frozen, before).agrees()
        now = procfs.read(f"{frozen.live}/smaps")
        assert Recheck(frozen, now).agrees()
        frozen.open_injection()
        assert still_said(frozen, now) == now
        assert Recheck(frozen, now).agrees()
    finally:
        frozen.release()
    toy.do("n.madvise(mmap.MADV_DOFORK)")
    frozen = freeze(toy.process.pid)
    try:
        assert Recheck(frozen, before).agrees()
        assert Recheck(frozen, same).agrees()
    finally:
        frozen.release()
    toy.do("n.close()")
    frozen = freeze(toy.process.pid)
    try:
        assert still_said(frozen, before) == b""
    finally:
        frozen.release()


@needs_record
@pytest.mark.parametrize("late", [NO_FORK, "n[7 * 4096] = 120"])
def test_advice_of_the_last_moment_moves_as_well(toy: Toy, mover: Mover, late: str) -> None:
    toy.do(APART)
    pid = toy.process.pid
    source, destination = mover.worker(), mover.worker()
    ids = {"pid": pid, "ppid": 1, "pgid": pid, "sid": pid}
    ready = destination.ask("prepare", place={"init": mover.space.init}, address="127.0.0.1", **ids)
    where = {"host": "127.0.0.1", "port": ready["port"], "token": ready["token"]}
    destination.start("stage", timeout_s=30)
    assert source.ask("watch", pid=pid, **where)["watched"]
    while not source.ask("copy", seconds=1)["done"]:
        pass
    destination.finish()
    toy.do(late)
    seen = source.ask("freeze", pid=pid, inspect=True, moving=True, ahead=True, **where)
    stdio, silent = socket.socketpair()
    with stdio, silent:
        externals = {external["key"]: 0 for external in seen["externals"]}
        destination.start("receive", [stdio.fileno()], externals=externals, ahead=True, timeout_s=30)
        sent = source.ask("send", ahead=True, **where)["bytes"]
        destination.finish()
        assert sent < seen["process"]["bytes"], "nothing was kept of what went ahead"
        source.ask("vanish")
        assert advised(destination.ask("resume")["hostpid"]) == ([2 << 20] if late is NO_FORK else [])


def test_what_goes_ahead() -> None:
    def vma(path: str, prot: int, flags: str, size: int = 1 << 20, shared: bool = False) -> procfs.Vma:
        one = procfs.parse_maps(f"{0x10000:x}-{0x10000 + size:x} ---p 00000000 00:00 0 {path}\n".encode())[0]
        one.prot, one.shared, one.flags = prot, shared, frozenset(flags.split())
        return one

    assert is_plain(vma("", 3, "rd wr mr mw me ac"))
    assert is_plain(vma("[heap]", 3, "rd wr"))
    for other in (
        vma("[stack]", 3, "rd wr gd"), vma("", 1, "rd"), vma("/lib/x", 3, "rd wr"), vma("", 3, "rd wr gd"),
        vma("", 3, "rd wr um"), vma("", 3, "", 4096), vma("", 3, "", shared=True),
    ):  # fmt: skip
        assert not is_plain(other)
