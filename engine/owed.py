"""What of a process's memory may come after it: post-copy.

Large plain memory stays where the process comes from, which owes it then: `engine/owing.py` keeps and sends it,
`engine/filling.py` waits for it where the process runs. Everything else is in the image, and so is what the kernel or
an engine may look at before the process takes its first step: its stacks' ends, and the threads' own areas.
"""

from engine import image as img
from engine.freeze import Frozen
from engine.image import Image, ImageError
from engine.linux import ptrace
from engine.memory import Survey
from engine.spans import Spans, both, merge, size, without
from engine.staging import KINDS
from engine.tracking import is_plain
from engine.vdso import FRAME_SCAN

LEAST = 4 << 20  # bytes: what is less is sent in less time than all this takes
_LARGE = 1 << 20  # of one mapping
_LEFT_OUT = frozenset(("lo", "lf", "wf"))  # locked: it is to be there at any time; a fork's child has none of the last
_BELOW = 4096  # bytes below the stack pointer: its red zone
_AREA = 8192  # around a thread's control block, which has its rseq area and the head of its robust list


def choose(frozen: Frozen, survey: Survey) -> Spans:
    """What of a process that stands still may come later; nothing where that is little."""
    files = {region.start: region.file for region in survey.regions}
    plain = merge(
        (vma.start, vma.end)
        for vma in frozen.vmas
        if is_plain(vma)
        and vma.end - vma.start >= _LARGE
        and not vma.flags & _LEFT_OUT
        and files.get(vma.start) == -1
    )
    found = without(plain, _at_once(frozen))
    return found if size(found) >= LEAST and own_bytes(frozen) >= LEAST else []


def _at_once(frozen: Frozen) -> Spans:
    spans = []
    for thread in frozen.threads:
        registers = thread.registers
        pointer, length, _, _ = ptrace.rseq_configuration(thread.tid)
        spans += [
            (registers.stack - _BELOW, registers.stack + FRAME_SCAN),
            (registers.thread_area - _AREA, registers.thread_area + _AREA),
            (pointer, pointer + length),
        ]
    page = img.PAGE
    return merge((max(start, 0) // page * page, -(-end // page) * page) for start, end in spans)


def own_bytes(frozen: Frozen) -> int:
    """Bytes that are a process's own, present or swapped out."""
    return sum(int(frozen.status.get(key, "0 kB").split()[0]) << 10 for key in ("RssAnon", "VmSwap"))


def regions_of(image: Image, spans: Spans) -> Spans:
    """The mappings that these lie in.

    Raises:
        ImageError: they are no plain memory of the process.
    """
    found = [(r.start, r.end) for r in image.regions if r.file < 0 and r.flags in KINDS and not r.lock]
    found = [region for region in found if both([region], spans)]
    if without(spans, merge(found)):
        raise ImageError("what is to come is no memory of the process")
    if both(spans, merge((address, address + length) for address, length in img.runs_of(image))):
        raise ImageError("pages are to come, and are there")
    return found
