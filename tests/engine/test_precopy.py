"""What goes ahead of a move: sets of addresses, the record of writes, and what is believed of the other side."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator

import msgpack
import pytest

from engine import spans
from engine.image import ImageError
from engine.linux import procfs, userfaultfd
from engine.precopy import Layout
from engine.staging import NORESERVE, PLAIN, Keep
from engine.tracking import Unwatchable, begin, is_plain

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

    def do(self, line: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
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
