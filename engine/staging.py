"""Memory of a process that is still running elsewhere, laid out and filled where it is going to run.

It lies at its final addresses in the very process that will become the copy: the stopped child on a node, or the ghost,
which runs on. What of it is of use is known when the source stands still; the rest is unmapped then.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgpack

from engine import image as img
from engine import note
from engine.freeze import freeze
from engine.image import Image, ImageError
from engine.linux import procfs
from engine.memory import receive_pages
from engine.runner import Calls
from engine.spans import Spans, both, merge, overlapping, runs, without
from engine.stream import Stream
from engine.target import Target

PLAIN: Final = 0x22  # MAP_PRIVATE | MAP_ANONYMOUS
NORESERVE: Final = 0x4000
KINDS: Final = (PLAIN, PLAIN | NORESERVE)
_READ_WRITE: Final = 3
_MAP_FIXED_NOREPLACE: Final = 0x100000
_MADV_DONTNEED: Final = 4
_IN_ROUNDS: Final = (img.LAYOUT, img.PAGES, img.PACKED, img.ROUNDS_END)


class Host(Protocol):
    """The process that holds the memory for now."""

    pid: int

    def batch(self) -> contextlib.AbstractContextManager[Calls]:
        """Calls of that process, made at the end of the context."""

    def remember(self, spans: Spans) -> None:
        """These are to be unmapped, should this worker be killed."""

    def taken(self) -> Spans:
        """Where there is no room."""


class Child:
    """The stopped process on a node: a new one, which ends with its tracer, or a placeholder, which does not."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.pid = target.pid
        self._start = procfs.parse_stat(procfs.read(procfs.own_file(self.pid, "stat"))).starttime

    @contextlib.contextmanager
    def batch(self) -> Iterator[Calls]:
        calls = Calls(self._target.injection)
        yield calls
        calls.run()

    def remember(self, spans: Spans) -> None:
        self._target.staged = spans
        if self._target.in_place:
            note.stage(self.pid, self._start, spans)

    def taken(self) -> Spans:
        return _mapped(self.pid)


class Ghost:
    """A ghost on the master, which goes on with its work: it is stopped for each batch."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._start = procfs.parse_stat(procfs.read(procfs.own_file(pid, "stat"))).starttime

    @contextlib.contextmanager
    def batch(self) -> Iterator[Calls]:
        frozen = freeze(self.pid)
        try:
            calls = Calls(frozen.open_injection())
            yield calls
            calls.run()
        finally:
            frozen.release()

    def remember(self, spans: Spans) -> None:
        note.stage(self.pid, self._start, spans)

    def taken(self) -> Spans:
        return _mapped(self.pid)


def _mapped(pid: int) -> Spans:
    return merge((vma.start, vma.end) for vma in procfs.parse_maps(procfs.read(f"/proc/{pid}/maps")))


@dataclass(slots=True)
class Keep:
    """What of the staged memory is the process's, once that stands still.

    Attributes:
        regions: the mappings that go on with what is there.
        stale: pages in them that hold something of the past; zero now, unless they come with the image.
    """

    regions: Spans
    stale: Spans

    def packed(self) -> bytes:
        """For the stream."""
        body: bytes = msgpack.packb([self.regions, self.stale])
        return body

    @classmethod
    def unpacked(cls, body: bytes) -> "Keep":
        """Inverse of `packed`. Raises ImageError."""
        regions, stale = (checked(part) for part in unpack(body, 2))
        return cls(regions, stale)


def unpack(body: bytes, count: int) -> list[object]:
    """The parts of a body. Raises ImageError: these are not so many."""
    try:
        parts = msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException) as error:
        raise ImageError(f"{type(error).__name__}: {error}") from error
    if type(parts) is not list or len(parts) != count:
        raise ImageError("parts of a round are missing")
    return parts


def checked(part: object) -> Spans:
    """A part of a body that is spans. Raises ImageError."""
    if type(part) is not list:
        raise ImageError("no list of spans")
    spans: Spans = []
    for item in part:
        if type(item) is not list or len(item) != 2 or any(type(edge) is not int for edge in item):
            raise ImageError("a span is not two addresses")
        start, end = item
        if not (spans[-1][1] if spans else 0) <= start < end <= img.TOP or (start | end) % img.PAGE:
            raise ImageError("spans overlap or are not aligned")
        spans.append((start, end))
    return spans


@dataclass(slots=True)
class Stage:
    """The staged memory of one process to be."""

    host: Host
    spans: Spans = field(default_factory=list)
    received: int = 0  # bytes

    def receive(self, stream: Stream) -> None:
        """Take all rounds from the source. Raises OSError."""
        stream.send(img.frame(img.ROOM, msgpack.packb(self.host.taken())))
        while True:
            kind, body = img.read_frame(stream.receive, _IN_ROUNDS, img.MAX_META)
            if kind == img.LAYOUT:
                failed = self._lay(body)
                stream.send(img.frame(img.ROOM, msgpack.packb(failed)))
            elif kind == img.PAGES:
                self._fill(checked(unpack(body, 1)[0]), stream.receive_part)
            elif kind == img.PACKED:
                stream.packed = True
            else:
                stream.send(img.frame(img.ROUNDS_END, b""))
                return

    def _lay(self, body: bytes) -> Spans:
        """Unmap and map. Returns what could not be mapped."""
        drop, plain, unreserved = (checked(part) for part in unpack(body, 3))
        if without(drop, self.spans):
            raise ImageError("it drops what is not there")
        wanted = [(PLAIN, span) for span in plain] + [(PLAIN | NORESERVE, span) for span in unreserved]
        planned = merge([*without(self.spans, drop), *plain, *unreserved])
        self.host.remember(merge([*self.spans, *planned]))
        with self.host.batch() as calls:
            for start, end in drop:
                calls.add("munmap", start, end - start)
            for flags, (start, end) in wanted:
                calls.add("mmap", start, end - start, _READ_WRITE, flags | _MAP_FIXED_NOREPLACE, -1, 0, must=False)
        results = calls.results[len(drop) :]
        failed = merge(span for (_, span), made in zip(wanted, results, strict=True) if made != span[0])
        self.spans = without(planned, failed)
        self.host.remember(self.spans)
        return failed

    def _fill(self, spans: Spans, receive: Callable[[memoryview], None]) -> None:
        if without(spans, self.spans):
            raise ImageError("pages come for memory that is not there")
        receive_pages(self.host.pid, -1, runs(spans), lambda address: True, receive)
        self.received += sum(end - start for start, end in spans)

    def discard(self, held: Target | None) -> None:
        """Nothing stays, in a host that lives on.

        Args:
            held: the host, where this worker has it stopped already.
        """
        if self.spans and (held is None or held.in_place):
            with contextlib.suppress(OSError), (self.host if held is None else Child(held)).batch() as calls:
                for start, end in self.spans:  # fails where it has ended: nothing is left then
                    calls.add("munmap", start, end - start, must=False)
        self.forget()

    def forget(self) -> None:
        """The memory belongs to the process that is being built now, or went with its host."""
        self.spans = []
        self.host.remember([])

    def settle(self, calls: Calls, image: Image, keep: Keep) -> None:
        """Add the calls after which the kept regions are mapped and hold what is kept, and nothing else is mapped.

        Raises:
            ImageError: the regions are not those of the image.
        """
        mapped = {(r.start, r.end) for r in image.regions if r.file < 0 and r.flags in KINDS}
        if not mapped.issuperset(keep.regions):
            raise ImageError("what is kept is no memory of the process")
        for start, end in without(self.spans, keep.regions):
            calls.add("munmap", start, end - start, label="unmapping what is gone")
        regions = {r.start: r for r in image.regions}
        for region in keep.regions:
            for start, end in without([region], overlapping(self.spans, *region)):
                kind = regions[region[0]].flags | _MAP_FIXED_NOREPLACE
                calls.add("mmap", start, end - start, _READ_WRITE, kind, -1, 0, label="mapping memory")
        for start, end in both(merge(keep.stale), merge(keep.regions)):
            calls.add("madvise", start, end - start, _MADV_DONTNEED, label="dropping stale pages")

    def protect(self, calls: Calls, image: Image, keep: Keep) -> None:
        """Add the calls after which they have their protections."""
        regions = {r.start: r for r in image.regions}
        for start, end in keep.regions:
            prot = regions[start].prot
            if prot != _READ_WRITE:
                calls.add("mprotect", start, end - start, prot, label="protecting memory")
