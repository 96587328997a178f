"""What the processes of a tree that moves as a whole share: open file descriptions, pipes, socket pairs, memory.

It travels once, beside their images, and is made once; each process is handed what it has of it. What somebody outside
of the tree holds as well is no such thing: it is judged for each process by itself.

Stream: frame(KIN), then the bytes of its memory, object by object and run by run; the destination answers frame(HELD)
or frame(ERROR).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Final

import msgpack

from engine import image as img
from engine import lending, nameless, outsiders, sysv
from engine.descriptors import paths, rebuild
from engine.descriptors.inspection import kind_of, probes_of
from engine.descriptors.kin import FIRST_KEY, SHM, Object, is_without_place
from engine.descriptors.model import CONTENT_LIMIT, O_ASYNC, Entry, Kind, Probe, Refusal, Source, boot_id
from engine.linux import kcmp, procfs, shm
from engine.linux.credentials import Credentials
from engine.linux.procfs import Vma
from engine.state import credentials
from engine.stream import Stream

_ALWAYS: Final = ("pipe", "fifo", "socketpair", "memfd")  # one object, maybe of several descriptions
_APART: Final = ("device", "directory", "path", "signalfd")  # each may have its own: nobody will notice
_ALONE: Final = {"epoll": "an epoll set", "pidfd": "a pidfd", "other": "something"}
_CLONED: Final = ((kcmp.VM, "memory"), (kcmp.FILES, "descriptor table"), (kcmp.FS, "working directory"))
_CHUNK: Final = 1 << 20


@dataclass(slots=True)
class Memory:
    """Shared memory that no descriptor leads to.

    Attributes:
        path: where it is, on this machine; empty where it has no name any more.
        fd: open for reading; ours to close.
        runs: [offset, length] of what is no hole.
        segment: where it is System V's.
    """

    key: int
    name: bytes
    what: Object
    path: bytes
    size: int
    runs: list[list[int]]
    fd: int
    segment: shm.Segment | None = None


@dataclass(slots=True)
class Shared:
    """What a tree shares.

    Attributes:
        table: entries as of an image, whose one descriptor number is their key.
        fds: host pid -> its numbers and their keys.
        objects: what may be mapped -> key of what leads to it.
        maps: host pid -> device, inode and key of what it maps.
        relayed: host pid -> its numbers of what is to be relayed, each with a number that the description has.
        refusals: sentences about what cannot move.
        segments: their System V shared memory; ours to close.
        rights: of the first of the processes, as of engine.state.credentials: they are those to open files with.
    """

    rights: dict[str, Any]
    segments: sysv.Segments
    table: list[Entry] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    fds: dict[int, list[list[int]]] = field(default_factory=dict)
    objects: dict[Object, int] = field(default_factory=dict)
    maps: dict[int, list[list[int]]] = field(default_factory=dict)
    relayed: dict[int, list[list[int]]] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """What the daemon is told."""
        return {"fds": self.fds, "maps": self.maps, "relayed": self.relayed, "refusals": self.refusals}

    def send(self, stream: Stream) -> int:
        """Stream it. Returns the bytes of memory. Raises OSError."""
        memory = [
            [one.key, one.name, one.what, one.path, one.size, one.runs, astuple(one.segment) if one.segment else []]
            for one in self.memory
        ]
        plain = {"table": self.table, "memory": memory, "rights": self.rights, "boot": boot_id()}
        stream.send(img.frame(img.KIN, msgpack.packb(plain)))
        total = 0
        for one in self.memory:
            for offset, length in one.runs:
                for at in range(offset, offset + length, _CHUNK):
                    part = os.pread(one.fd, min(_CHUNK, offset + length - at), at)
                    stream.send(part.ljust(min(_CHUNK, offset + length - at), b"\0"))
                total += length
        return total

    def close(self) -> None:
        """Close what we hold of its memory."""
        for one in self.memory:
            os.close(one.fd)
        self.memory = []


@dataclass(slots=True)
class _Description:
    """One open file description, and the numbers that each process has of it."""

    probe: Probe
    holders: dict[int, list[int]]


def gather(pids: Sequence[int], contents: int = CONTENT_LIMIT, bare: bool = False, at_home: bool = False) -> Shared:
    """What these processes share, all of which stand still.

    Args:
        pids: host pids, each after its parent.
        contents: bytes of files without a name that may travel.
        bare: the destination does not have users' files.
        at_home: they leave the master.

    Raises:
        OSError: one of them is gone.
    """
    found = Shared(credentials(_status(pids[0])), sysv.Segments(pids[0]))
    for part in (found.fds, found.maps, found.relayed):
        part.update((pid, []) for pid in pids)
    found.refusals += _cloned(pids)
    try:
        with Source(pids[0], contents, bare, at_home, frozenset(pids)) as source:
            described = _merge(pids)
            source.probes = [one.probe for one in described]
            for index, one in enumerate(described):
                if kind_of(source, one.probe).name == "external":
                    for pid, numbers in one.holders.items():
                        found.relayed[pid] += [[number, index] for number in numbers]
                else:
                    _take(source, one, found)
        _take_memory(pids, found)
    except BaseException:
        found.close()
        found.segments.close()
        raise
    return found


def _status(pid: int) -> dict[str, str]:
    return procfs.parse_status(procfs.read(procfs.own_file(pid, "status")))


def _name(pid: int) -> int:
    """The number by which the process knows itself."""
    return procfs.inner_pid(_status(pid))


def _cloned(pids: Sequence[int]) -> Iterator[str]:
    for index, pid in enumerate(pids):
        for other in pids[:index]:
            what = [name for kind, name in _CLONED if kcmp.same(pid, other, kind)]
            if what:
                yield f"process {_name(pid)} has its {' and '.join(what)} in common with process {_name(other)}"


def _merge(pids: Sequence[int]) -> list[_Description]:
    groups: dict[tuple[object, ...], list[_Description]] = {}
    merged = []
    for pid in pids:
        for probe in probes_of(pid):
            probe.pid = pid
            group = groups.setdefault((probe.link, probe.flags, probe.pos), [])
            numbers = [fd for fd, _ in probe.fds]
            for known in group:
                if kcmp.same_file(known.probe.pid, known.probe.fd, probe.fd, pid):
                    known.holders[pid] = numbers
                    break
            else:
                one = _Description(probe, {pid: numbers})
                group.append(one)
                merged.append(one)
    return merged


def _take(source: Source, one: _Description, found: Shared) -> None:
    probe, kind = one.probe, kind_of(source, one.probe)
    is_memory = kind.name == "file" and is_without_place(probe)
    if kind.name in _APART or (kind.name not in _ALWAYS and not is_memory and len(one.holders) == 1):
        return
    try:
        entry = _dump(source, one, kind) if not is_memory else paths.dump_content(source, probe)
    except Refusal as refusal:
        if kind.name == "socketpair":
            return  # whoever has it names it, or leaves it out
        found.refusals.append(f"fd {probe.fd} of process {_name(probe.pid)} {refusal}")
        return
    key = FIRST_KEY + len(found.table)
    entry["fds"] = [[key, False]]
    found.table.append(entry)
    for pid, numbers in one.holders.items():
        found.fds[pid] += [[number, key] for number in numbers]
    if entry["kind"] in ("memfd", "deleted"):
        what = (entry["dev"], entry["ino"])
        if what not in found.objects or probe.access == os.O_RDWR:
            found.objects[what] = key


def _dump(source: Source, one: _Description, kind: Kind) -> Entry:
    probe = one.probe
    if len(one.holders) > 1:
        others = ", ".join(str(_name(pid)) for pid in one.holders if pid != probe.pid)
        if kind.name in _ALONE:
            raise Refusal(f"is {_ALONE[kind.name]} that it shares with process {others}")
        if probe.flags & O_ASYNC:
            raise Refusal(f"sends signals (O_ASYNC), and is shared with process {others}")
    return kind.dump(source, probe)


def _may_be_memory(vma: Vma) -> bool:
    if vma.path.startswith((SHM, sysv.PREFIX)):
        return True
    return nameless.is_nameless(vma) and not nameless.is_huge(vma) and not lending.borrowed_name(vma.path)


def _take_memory(pids: Sequence[int], found: Shared) -> None:
    holders: dict[outsiders.Inode, dict[int, Vma]] = {}
    judged: dict[outsiders.Inode, outsiders.Mapped] = {}
    for pid in pids:
        for vma in procfs.parse_maps(procfs.read(f"/proc/{pid}/maps")):
            if vma.shared and _may_be_memory(vma):
                holders.setdefault((vma.major, vma.minor, vma.inode), {}).setdefault(pid, vma)
    for by in holders.values():
        pid, vma = next(iter(by.items()))
        if vma.path.startswith(sysv.PREFIX):
            _take_segment(pids, by, found)
            continue
        file = nameless.describe(pid, vma)
        what = (file.device, file.inode)
        if what not in found.objects:
            path = _named(by.values(), what)
            if len(by) == 1 and not (path and vma.deleted):
                continue
            fd = nameless.open_object(pid, vma)
            key = FIRST_KEY + len(found.table) + len(found.memory)
            runs = [[start, end - start] for start, end in nameless.data(fd, 0, file.size)]
            found.memory.append(Memory(key, nameless.short_name(file), what, path, file.size, runs, fd))
            found.objects[what] = key
        for pid in by:
            found.maps[pid].append([*what, found.objects[what]])
        judged[vma.major, vma.minor, vma.inode] = outsiders.Mapped(vma, file)
    for inode, text in outsiders.find(judged, set(pids)):
        found.refusals.append(f"process {_name(next(iter(holders[inode])))}: {text}")


def _take_segment(pids: Sequence[int], by: Mapping[int, Vma], found: Shared) -> None:
    pid, vma = next(iter(by.items()))
    segment = found.segments.look(vma.inode)
    file, whose = nameless.describe(pid, vma), f"process {_name(pid)}: System V shared memory {segment.id}"
    if sysv.count(pids, vma) != segment.attachments:
        found.refusals.append(f"{whose} is attached by another process as well")
    for one in by:
        if not sysv.is_whole(sysv.mappings(one, vma), segment.size):
            what = f"a part of System V shared memory {segment.id}"
            found.refusals.append(f"process {_name(one)}: it has unmapped {what}")
    fd = nameless.open_object(pid, vma)
    key = FIRST_KEY + len(found.table) + len(found.memory)
    runs = [[start, end - start] for start, end in nameless.data(fd, 0, segment.size)]
    found.memory.append(
        Memory(key, nameless.short_name(file), (file.device, file.inode), b"", segment.size, runs, fd, segment)
    )
    for one in by:
        found.maps[one].append([file.device, file.inode, key])


def _named(vmas: Iterable[Vma], what: Object) -> bytes:
    """A name of memory that has one, maybe not the one by which it was opened: sem_open(3) makes it under another."""
    ways = [vma.path for vma in vmas if vma.path.startswith(SHM)]
    for path in ways:
        if not path.endswith(" (deleted)"):
            return os.fsencode(path)
    for name in os.listdir(SHM) if ways else ():
        with contextlib.suppress(OSError):
            info = os.lstat(SHM + name)
            if (info.st_dev, info.st_ino) == what:
                return os.fsencode(SHM + name)
    return b""


# ---- the destination -------------------------------------------------------------------------------------


def receive(stream: Stream, root: int, segments: sysv.Segments, bodies: int = img.MAX_META) -> dict[int, int]:
    """Make what comes: key -> descriptor of this process, the caller's to close.

    Args:
        root: host pid of a process whose root directory paths mean.
        segments: of its IPC namespace: System V shared memory that is made.

    Raises:
        OSError: it is no such stream, or something could not be made; nothing stays open.
    """
    _, body = img.read_frame(stream.receive, (img.KIN,), bodies)
    with img.believing_nothing():
        plain = msgpack.unpackb(body, strict_map_key=False)
        table, memory, who = plain["table"], plain["memory"], _rights(plain["rights"])
        _check(table, memory)
    made: dict[int, int] = {}
    place = os.open(f"/proc/{root}/root", os.O_PATH | os.O_CLOEXEC)
    try:
        made.update((one.target_fd, one.local_fd) for one in rebuild(table, {}, root, who, root))
        for key, name, (device, inode), path, size, runs, segment in memory:
            if segment:
                made[key] = segments.make(shm.Segment(*segment))
                _fill(made[key], runs, stream)
                continue
            same = paths.find_same(place, path, plain["boot"] if path else b"", (device, inode))
            made[key] = os.memfd_create(os.fsdecode(name), os.MFD_CLOEXEC) if same is None else same
            if same is None:
                os.ftruncate(made[key], size)
            _fill(made[key] if same is None else None, runs, stream)
    except BaseException:
        for fd in made.values():
            os.close(fd)
        raise
    finally:
        os.close(place)
    return made


def _fill(fd: int | None, runs: Sequence[Sequence[int]], stream: Stream) -> None:
    buffer = mmap.mmap(-1, _CHUNK)
    with memoryview(buffer) as view:
        for offset, length in runs:
            for at in range(offset, offset + length, _CHUNK):
                with view[: min(_CHUNK, offset + length - at)] as part:
                    stream.receive_into(part)
                    if fd is not None:
                        os.pwrite(fd, part, at)
    buffer.close()


def _rights(plain: Mapping[str, Any]) -> Credentials:
    return Credentials(plain["uids"][3], plain["gids"][3], tuple(plain["groups"]), plain["effective"])


def _check(table: Any, memory: Any) -> None:
    if any(len(entry["fds"]) != 1 for entry in table):
        raise ValueError("a thing that is shared has one key")
    for _, name, _, _, size, runs, segment in memory:
        if segment and (len(segment) != 9 or any(type(one) is not int for one in segment) or segment[7] != size):
            raise ValueError("no System V shared memory")
        if len(name) > 200 or not 0 <= size <= img.TOP or any(o < 0 or n <= 0 or o + n > size + 4096 for o, n in runs):
            raise ValueError("memory of an impossible size")
