"""The image of a process: what is in it, and its bytes on a stream.

Stream: frame(META) · frame(STATE) · raw pages, in the order of `Image.runs` · frame(END). META is what the
destination can begin with while the source still asks the process for the rest, its STATE. To a destination that builds
at once the pages may go before that is asked: frame(META) · frame(LATER) · pages · frame(STATE) · frame(END). Where
memory went ahead in rounds (engine/precopy.py, engine/staging.py), these come first, and frame(KEEP) before META; where
some comes later (engine/owed.py), frame(OWED) does, and after GO there are frames WANT, PIECE, TAKEN and LAST.

A frame is the header `magic 4s | version u16 | kind u16 | length u32 | crc32 u32` (little endian) and `length` bytes
of msgpack.
The destination may answer with frame(LACKS) first, and gets a frame(CONTENT) and its bytes for each file
(engine/lending.py). It answers with frame(HELD) or frame(ERROR). When the source is gone, it may say so
itself by frame(GO): the copy runs then. Pages carry no checksum of their own: TCP has one, and END repeats their number
of bytes. Every length is checked before anything is allocated.
"""

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from operator import attrgetter, itemgetter
from typing import Any, Final, TypeVar

import msgpack

MAGIC: Final = b"BPFI"
VERSION: Final = 8
META: Final = 1
STATE: Final = 14
END: Final = 2
HELD: Final = 3
ERROR: Final = 4
GO: Final = 5
ROOM: Final = 6  # from the destination: spans that it cannot map
LAYOUT: Final = 7  # spans to unmap and to map, before the process stands still
PAGES: Final = 8  # spans, whose pages follow
ROUNDS_END: Final = 9  # from the source, and back when all has been dealt with
KEEP: Final = 10  # what of all that is still true
LACKS: Final = 11  # from the destination, after END: files that it does not have
CONTENT: Final = 12  # of one of them, whose bytes follow
PACKED: Final = 13  # from the source, before all else: parts of pages come as engine/packing.py says
OWED: Final = 15  # from the source, before META: spans whose pages come when the copy runs
WANT: Final = 16  # from the destination: a page of these that is waited for
PIECE: Final = 17  # a span, all of which has been dealt with then, and the spans in it whose pages follow
TAKEN: Final = 18  # from the destination: these are where they belong
LAST: Final = 19  # from the source: all has been sent; and back, when it is there
LATER: Final = 21  # from the source, after META: STATE comes after the pages
KIN: Final = 20  # what the processes of a tree share (engine/kin.py)
_HEADER: Final = struct.Struct("<4sHHII")
HEADER_SIZE: Final = _HEADER.size
MAX_META: Final = 256 << 20  # bytes; a fragmented process of 1 TB stays below
MAX_SMALL: Final = 1 << 20  # END, HELD, ERROR, GO
PAGE: Final = 4096
TOP: Final = 1 << 47  # bytes of address space


class ImageError(OSError):
    """The stream is no image of ours, is damaged or ends too early."""

    def __init__(self, text: str) -> None:
        super().__init__(74, f"bad image: {text}")  # EBADMSG


@dataclass(slots=True)
class ThreadState:
    """One thread."""

    tid: int  # in the process's own pid namespace
    registers: bytes  # struct user_regs_struct
    xstate: bytes  # XSAVE area, standard format
    mask: int  # blocked signals
    altstack: bytes  # stack_t
    robust: list[int]  # head, length
    clear_tid: int
    rseq: list[int]  # pointer, size, signature, flags
    comm: bytes
    pending: list[bytes]  # siginfo_t, 128 bytes each
    policy: bytes  # struct sched_attr
    affinity: list[int]  # CPUs; empty: all
    prime: list[int] = field(default_factory=list)  # an interrupted sleep: call number, remaining ns
    io_priority: int = 0  # as of ioprio_get(2)
    timer_slack: int = 0  # ns
    switches: list[int] = field(default_factory=list)  # engine/switches.py


@dataclass(slots=True)
class MappedFile:
    """A file that is mapped or otherwise referred to by path, and the identity it must have."""

    path: bytes
    device: int
    inode: int
    size: int
    mtime_ns: int
    writable: bool  # to be opened for writing too (shared, writable mapping)
    nameless: bool = False  # memory that is made anew (engine/nameless.py)
    digest: bytes = b""  # SHA-256 of its content; empty: device and inode tell, else size and mtime

    def plain(self) -> list[Any]:
        """For messages."""
        return [getattr(self, name) for name in MappedFile.__slots__]


@dataclass(slots=True)
class Region:
    """One mapping."""

    start: int
    end: int
    prot: int
    flags: int  # MAP_*
    file: int  # index into Image.files, -1 anonymous
    offset: int
    advice: list[int]  # MADV_*
    lock: int  # 0 no, 1 mlock, 2 on fault
    name: bytes  # PR_SET_VMA_ANON_NAME
    sealed: bool


@dataclass(slots=True)
class Image:
    """A whole process but its pages. From `threads` on it is STATE; the rest is META."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    stopped: bool
    comm: bytes
    vdso: bytes  # BLAKE2b-128 of the vDSO's code
    vdso_code: bytes  # that code, deflated
    special: list[list[Any]]  # [name, start, end] of vvar and vdso
    relics: list[list[Any]]  # vDSOs of former kernels (engine/vdso.py): digest, [[name, start, end], …]
    cpu: bytes  # engine/cpu.py: what CPU it has seen
    fresh: bool  # at its exec: nothing of it has run, it has seen no CPU yet
    files: list[MappedFile]
    exe: int  # index into files
    cwd: int  # index into files
    regions: list[Region]
    runs: bytes  # pairs of u64: address, length
    mm: list[int]  # start_code … env_end as in proc(5) stat
    auxv: bytes
    credentials: dict[str, Any]
    busy_signals: int  # a bit for each that is pending, caught or ignored
    descriptors: list[dict[str, Any]]  # engine/descriptors' table
    frozen_ns: int  # how long it had been frozen when this was written
    total: int  # bytes of pages
    threads: list[ThreadState] = field(default_factory=list)
    shared_pending: list[bytes] = field(default_factory=list)
    actions: dict[int, bytes] = field(default_factory=dict)  # signal -> struct kernel_sigaction; not the default's
    itimers: list[bytes] = field(default_factory=list)  # real, virtual, profiling: struct itimerval
    # Each: id, sigev notify, signal, value, tid, clock, itimerspec bytes, overrun.
    timers: list[list[Any]] = field(default_factory=list)
    limits: list[list[int]] = field(default_factory=list)  # soft, hard, by RLIMIT_ number
    umask: int = 0
    personality: int = 0
    dumpable: int = 0
    death_signal: int = 0
    subreaper: int = 0
    thp_disabled: int = 0  # as of PR_GET_THP_DISABLE: bit 0, and flags
    lock_future: int = 0  # of mlockall(2): 0, MCL_FUTURE, or that with MCL_ONFAULT
    oom_score_adj: int = 0
    brk: int = 0
    securebits: int = 0
    barriers: int = 0  # commands of membarrier(2) that it has registered for, a bit each
    core_filter: int = 0  # as of /proc/PID/coredump_filter
    memory_merge: int = 0  # as of PR_GET_MEMORY_MERGE
    machine_checks: int = 2  # as of PR_MCE_KILL_GET; 2: the machine's way


T = TypeVar("T")
_NESTED: Final[dict[str, type]] = {"files": MappedFile, "regions": Region, "threads": ThreadState}


_plain: Final = {kind: attrgetter(*(f.name for f in fields(kind))) for kind in _NESTED.values()}


def _pack(image: Image, names: Sequence[str]) -> bytes:
    body = {name: getattr(image, name) for name in names}
    for name, kind in _NESTED.items():
        if name in body:
            body[name] = list(map(_plain[kind], body[name]))
    packed: bytes = msgpack.packb(body)
    return packed


def _unpack(body: bytes, names: Sequence[str]) -> dict[str, Any]:
    plain = msgpack.unpackb(body, strict_map_key=False)
    for name, kind in _NESTED.items():
        if name in names:
            if type(plain[name]) is not list:  # an empty text would pass for an empty list
                raise ImageError(f"{name} is a {type(plain[name]).__name__}")
            plain[name] = [_typed(kind, item) for item in plain[name]]
    _check_types(names, [plain[name] for name in names])
    if len(plain) != len(names):
        raise ImageError("fields are unknown")
    return dict(plain)


@contextmanager
def believing_nothing() -> Iterator[None]:
    """Whatever a body that is not ours makes fail in this context, is an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except (
        ValueError, TypeError, KeyError, IndexError, msgpack.UnpackException, struct.error, AttributeError,
    ) as error:  # fmt: skip
        raise ImageError(f"{type(error).__name__}: {error}") from error


def encode(image: Image) -> bytes:
    """The META body."""
    return _pack(image, _META)


def decode(body: bytes) -> Image:
    """Inverse of `encode`; `add_state` gives it the rest. Raises ImageError."""
    with believing_nothing():
        image = Image(**_unpack(body, _META))
        _check(image)
        return image


def encode_state(image: Image) -> bytes:
    """The STATE body."""
    return _pack(image, _STATE)


def add_state(image: Image, body: bytes) -> None:
    """Inverse of `encode_state`. Raises ImageError."""
    with believing_nothing():
        for name, value in _unpack(body, _STATE).items():
            setattr(image, name, value)
        if not image.threads:
            raise ImageError("it has no threads")


def head(image: Image) -> bytes:
    """META and STATE, as frames."""
    return frame(META, encode(image)) + frame(STATE, encode_state(image))


def read_head(read: Callable[[int], bytes]) -> Image:
    """Inverse of `head`. `read` as of `read_frame`. Raises ImageError."""
    image = decode(read_frame(read, (META,), MAX_META)[1])
    add_state(image, read_frame(read, (STATE,), MAX_META)[1])
    return image


_BASIC: Final = {"int": int, "bytes": bytes, "bool": bool}
_FIELDS: Final[dict[type, list[tuple[str, type | None]]]] = {
    kind: [(f.name, _BASIC.get(getattr(f.type, "__name__", ""))) for f in fields(kind)]
    for kind in (ThreadState, MappedFile, Region)
}


# Of each kind, the types of its fields of basic type, and what picks those out of all: there may be thousands of it.
_EXPECTED: Final = {kind: tuple(basic for _, basic in known if basic) for kind, known in _FIELDS.items()}
_pick: Final = {
    kind: itemgetter(*(i for i, (_, basic) in enumerate(known) if basic)) for kind, known in _FIELDS.items()
}


def _typed(kind: type[T], values: list[Any]) -> T:
    if len(values) != len(_FIELDS[kind]):
        raise ImageError("fields are missing, or unknown")
    if _pick[kind](tuple(map(type, values))) != _EXPECTED[kind]:
        raise ImageError(f"a {kind.__name__} has fields of other types")
    return kind(*values)


_NAMES: Final = [f.name for f in fields(Image)]
_META: Final = _NAMES[: _NAMES.index("threads")]
_STATE: Final = _NAMES[_NAMES.index("threads") :]
_TYPES: Final = {f.name: _BASIC.get(getattr(f.type, "__name__", "")) for f in fields(Image)}


def _check_types(names: Sequence[str], values: Sequence[object]) -> None:
    for name, value in zip(names, values, strict=True):
        basic = _TYPES[name]
        if basic is not None and type(value) is not basic:
            raise ImageError(f"{name} is a {type(value).__name__}")


def _check(image: Image) -> None:
    previous = 0
    for region in image.regions:
        if not previous <= region.start < region.end <= TOP or (region.start | region.end) % PAGE:
            raise ImageError("mappings overlap or are not aligned")
        if not -1 <= region.file < len(image.files):
            raise ImageError("a mapping refers to no file")
        previous = region.end
    if len(image.runs) % 16 or not all(0 <= i < len(image.files) for i in (image.exe, image.cwd)):
        raise ImageError("parts are missing")
    if sum(length for _, length in runs_of(image)) != image.total:
        raise ImageError("sizes do not add up")
    for address, length in runs_of(image):
        if address % PAGE or length % PAGE or not 0 < length <= TOP or address + length > TOP:
            raise ImageError("pages lie outside the address space")


def error_frame(code: int, text: str) -> bytes:
    """A frame ERROR."""
    return frame(ERROR, msgpack.packb({"errno": code, "text": text}, unicode_errors="surrogateescape"))


def failure(body: bytes) -> OSError:
    """What a frame ERROR tells. Raises ImageError."""
    with believing_nothing():
        answer = msgpack.unpackb(body, unicode_errors="surrogateescape")
        return OSError(int(answer["errno"]), str(answer["text"]))


def runs_of(image: Image) -> list[tuple[int, int]]:
    """(address, length) of the pages that follow META."""
    view = memoryview(image.runs).cast("Q").tolist()
    return list(zip(view[::2], view[1::2], strict=True))


def frame(kind: int, body: bytes) -> bytes:
    """One frame's bytes."""
    return _HEADER.pack(MAGIC, VERSION, kind, len(body), zlib.crc32(body)) + body


def read_frame(read: Callable[[int], bytes], kinds: tuple[int, ...], limit: int) -> tuple[int, bytes]:
    """Read one frame.

    Args:
        read: returns exactly n bytes, or fewer at the end of the stream.
        kinds: what may come here.
        limit: most bytes that are believed.

    Raises:
        ImageError: anything else came.
    """
    head = read(HEADER_SIZE)
    if len(head) < HEADER_SIZE:
        raise ImageError("it ends too early")
    magic, version, kind, length, checksum = _HEADER.unpack(head)
    if magic != MAGIC:
        raise ImageError("it is not an image")
    if version != VERSION:
        raise ImageError(f"version {version}, not {VERSION}")
    if kind not in kinds or length > limit:
        raise ImageError(f"unexpected frame {kind} of {length} bytes")
    body = read(length)
    if len(body) < length:
        raise ImageError("it ends too early")
    if zlib.crc32(body) != checksum:
        raise ImageError("wrong checksum")
    return kind, body
