"""Copying a process's memory in rounds while it runs, so that little is left to copy while it stands still.

Each round sends what was written since the one before. What is true is decided at the end, by the page tables of the
frozen process alone: a page is kept at the destination only where it is there, has been sent, and still has the mark
that its last round put on it. So mappings that came, went or moved, discarded pages and even another program are no
cases of their own.
"""

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import msgpack

from engine import image as img
from engine.linux import procfs
from engine.linux.procfs import Vma
from engine.memory import Survey, send_pages
from engine.runner import ProcessGone
from engine.spans import Spans, both, merge, of_runs, overlapping, runs, size, touches, without
from engine.staging import KINDS, NORESERVE, PLAIN, Keep
from engine.stream import Stream
from engine.tracking import Watch, is_plain

MOST_ROUNDS: Final = 12
MOST_TIMES: Final = 3  # the size of the first round, in all rounds together
SMALL: Final = 256 << 10  # bytes that are copied in less time than a round takes
_NO_GAIN: Final = 0.8  # of the round before: the process writes about as fast as we send
_NEW: Final = 1 << 20  # bytes of unwatched memory that are worth a stop of the process
_PIECE: Final = 8 << 20  # bytes between two looks at the clock


@dataclass(slots=True)
class Progress:
    """Where the rounds are. Sizes in bytes: of this round, and of all."""

    round: int = 0
    sent: int = 0
    size: int = 0
    total: int = 0
    done: bool = False


@dataclass(slots=True)
class Layout:
    """What is mapped at the destination, as the source knows it."""

    spans: dict[int, Spans] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    all: Spans = field(default_factory=list)  # whatever the kind
    refused: Spans = field(default_factory=list)  # no room there

    def holding(self, start: int, end: int, kind: int) -> tuple[int, int] | None:
        """The one span, of that kind, that a mapping would go on with; it may have to grow. None: there is none such.

        Where several are, the kernel would not make them one mapping, as it is one at the source.
        """
        found = {of: overlapping(spans, start, end) for of, spans in self.spans.items()}
        alone = len(found.pop(kind)) == 1 and not any(found.values())
        return overlapping(self.spans[kind], start, end)[0] if alone else None

    def plan(self, wanted: list[tuple[int, int, int]]) -> tuple[Spans, dict[int, Spans], Spans]:
        """What to drop and to map so that all wanted (start, end, kind) are there, and which of them begin anew."""
        drop: Spans = []
        make: dict[int, Spans] = {kind: [] for kind in KINDS}
        fresh: Spans = []
        for start, end, kind in wanted:
            span = self.holding(start, end, kind)
            if span is None:
                drop += [(max(start, a), min(end, b)) for a, b in overlapping(self.all, start, end)]
                make[kind].append((start, end))
                fresh.append((start, end))
            else:
                make[kind] += without([(start, end)], [span])
        return merge(drop), {kind: merge(spans) for kind, spans in make.items()}, fresh

    def apply(self, drop: Spans, make: dict[int, Spans], failed: Spans) -> None:
        """It has been done, but for what failed."""
        for kind in KINDS:
            self.spans[kind] = without(merge([*without(self.spans[kind], drop), *make[kind]]), failed)
        self.all = merge(span for spans in self.spans.values() for span in spans)
        self.refused = merge([*self.refused, *failed])


class Rounds:
    """The rounds of one process, on the source."""

    def __init__(self, pid: int, watch: Watch, stream: Stream) -> None:
        self.stream: Stream | None = stream
        self.progress = Progress()
        self._pid, self._watch = pid, watch
        self.marks = watch.marks
        self._layout = Layout()
        self._sent: Spans = []  # whose pages the destination has, of whatever age
        self.smaps = b""  # of the process, when the last round began
        self._first = 0
        self._before = 0  # bytes of the last round
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        self._work = self._run(stream)

    def advance(self, seconds: float) -> Progress:
        """Copy for so long, or to the end. Raises OSError."""
        deadline = time.monotonic() + seconds
        for _ in self._work:
            if time.monotonic() > deadline:
                break
        return self.progress

    def _run(self, stream: Stream) -> Iterator[None]:
        self._layout.refused = _spans(stream, img.ROOM)
        while not self.progress.done:
            yield from self._round(stream)
        stream.send(img.frame(img.ROUNDS_END, b""))
        img.read_frame(stream.receive, (img.ROUNDS_END,), 0)

    def _round(self, stream: Stream) -> Iterator[None]:
        progress = self.progress
        try:
            dirty = self._dirty(stream)
        except OSError as error:
            if procfs.has_ended(f"/proc/{self._pid}"):
                raise ProcessGone(self._pid) from None
            if error.errno != errno.ESRCH:
                raise
            progress.done = True  # it runs another program now
            return
        progress.round += 1
        progress.sent, progress.size = 0, size(dirty)
        self._first = self._first or progress.size
        for piece in _pieces(dirty):
            stream.send(img.frame(img.PAGES, msgpack.packb([piece])))
            send_pages(self._pid, self._memory, runs(piece), stream.send_part)
            progress.sent += size(piece)
            progress.total += size(piece)
            yield
        self._sent = merge([*self._sent, *dirty])
        progress.done = self._is_enough(progress.size)
        self._before = progress.size

    def _is_enough(self, now: int) -> bool:
        if now <= SMALL or self.progress.round >= MOST_ROUNDS or self.progress.total >= MOST_TIMES * self._first:
            return True
        return self.progress.round > 1 and now > _NO_GAIN * self._before

    def _dirty(self, stream: Stream) -> Spans:
        self._watch.begin_round()
        plain = [vma for vma in self._vmas() if self._is_staged(vma)]
        if size([(vma.start, vma.end) for vma in plain if not self._watch.covers(vma)]) >= _NEW:
            self._watch.extend()
            plain = [vma for vma in self._vmas() if self._is_staged(vma)]
        watched = [vma for vma in plain if self._watch.covers(vma)]
        taken = {vma.start: self._watch.take((vma.start, vma.end)) for vma in watched}
        filled = [vma for vma in watched if taken[vma.start] or touches(self._sent, vma.start, vma.end)]
        fresh = self._lay(stream, [(vma.start, vma.end, _kind(vma)) for vma in filled])
        dirty: Spans = []
        for vma in filled:
            span = (vma.start, vma.end)
            dirty += self._watch.present(span) if span in fresh else taken[vma.start]
        return both(merge(dirty), self._layout.all)

    def _vmas(self) -> list[Vma]:
        self.smaps = procfs.read(f"/proc/{self._pid}/smaps")
        return procfs.parse_smaps(self.smaps)

    def _is_staged(self, vma: Vma) -> bool:
        return is_plain(vma) and not touches(self._layout.refused, vma.start, vma.end)

    def _lay(self, stream: Stream, wanted: list[tuple[int, int, int]]) -> set[tuple[int, int]]:
        drop, make, fresh = self._layout.plan(wanted)
        if drop or any(make.values()):
            stream.send(img.frame(img.LAYOUT, msgpack.packb([drop, make[PLAIN], make[PLAIN | NORESERVE]])))
            failed = _spans(stream, img.ROOM)
            self._layout.apply(drop, make, failed)
            self._sent = without(self._sent, drop)
        return set(fresh)

    def settle(self, survey: Survey, found: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], Keep]:
        """The process stands still: (address, length) of the pages that have still to be sent, and what is kept.

        Args:
            survey: its mappings now.
            found: (address, length) of all pages to carry, in order.
        """
        whole = {start for start, _ in survey.whole}
        plain = [region for region in survey.regions if region.file < 0 and region.start not in whole]
        kept = [(r.start, r.end) for r in plain if r.flags in KINDS and self._goes_on(r.start, r.end, r.flags)]
        there = [(address, address + length) for address, length in found]
        current = both(both(of_runs(survey.clean), self._sent), kept)
        return runs(without(there, current)), Keep(kept, without(both(self._sent, kept), there))

    def _goes_on(self, start: int, end: int, kind: int) -> bool:
        return self._layout.holding(start, end, kind) is not None and not touches(self._layout.refused, start, end)

    def close(self) -> None:
        """End the record of writes, and the connection unless somebody took it."""
        self._watch.close()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
        if self.stream is not None:
            self.stream.close()
            self.stream = None


def _kind(vma: Vma) -> int:
    return PLAIN | NORESERVE if "nr" in vma.flags else PLAIN


def _spans(stream: Stream, kind: int) -> Spans:
    _, body = img.read_frame(stream.receive, (kind,), img.MAX_META)
    with contextlib.suppress(ValueError, TypeError, msgpack.UnpackException):
        return merge((int(start), int(end)) for start, end in msgpack.unpackb(body))
    raise img.ImageError("no list of spans")


def _pieces(spans: Spans) -> Iterator[Spans]:
    piece: Spans = []
    room = _PIECE
    for start, end in spans:
        while start < end:
            part = min(end - start, room)
            piece.append((start, start + part))
            start += part
            room -= part
            if not room:
                yield piece
                piece, room = [], _PIECE
    if piece:
        yield piece
