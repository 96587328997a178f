"""What the kinds of descriptors have in common: the source's side, the destination's side and the table between them.

A table entry is one *open file description* (shared by dup and fork) as a msgpack-able dict:

    kind    name of the kind that made it
    fds     [[number, close-on-exec], …], ascending
    flags   status flags and access mode as of open(2)
    dev, ino   the object on the source
    …       what the kind needs
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from engine.linux import mounts, process_vm, statx
from engine.linux.credentials import Credentials
from engine.linux.statx import Status

Entry = dict[str, Any]

O_ASYNC: Final = 0o20000
# What fcntl(F_SETFL) can change, O_ASYNC apart (it comes with an owner).
SETTABLE: Final = os.O_APPEND | os.O_NONBLOCK | os.O_DIRECT | os.O_NOATIME
CONTENT_LIMIT: Final = 64 << 20  # bytes of deleted files and memfds that travel with a process


class Refusal(Exception):
    """A descriptor that cannot move; the text completes `fd 5 is …` or is a whole sentence."""


@cache
def boot_id() -> bytes:
    """Names this kernel's run: device and inode numbers mean the same object only under the same one."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return bytes.fromhex(file.read().decode().strip().replace("-", ""))


@dataclass(slots=True)
class Probe:
    """One open file description of the source as /proc shows it.

    Attributes:
        fds: (number, close-on-exec) of each descriptor that shares it.
        link: text of the /proc/PID/fd link.
        flags: status flags and access mode.
        info: text of /proc/PID/fdinfo of the first.
        pid: host pid of its process; 0: the source's.
    """

    fds: list[tuple[int, bool]]
    link: bytes
    flags: int
    pos: int
    info: bytes
    status: Status
    pid: int = 0

    @property
    def fd(self) -> int:
        """The lowest number."""
        return self.fds[0][0]

    @property
    def access(self) -> int:
        """O_RDONLY, O_WRONLY or O_RDWR."""
        return self.flags & os.O_ACCMODE

    @property
    def stdio(self) -> bool:
        """Whether it is one of the three standard descriptors, or a duplicate."""
        return self.fd <= 2

    @property
    def is_anonymous(self) -> bool:
        """Whether it is of the kernel's anonymous inode (or pidfs), told apart by the link only."""
        return self.link.startswith((b"anon_inode:", b"pidfd:"))

    def field(self, name: bytes) -> bytes:
        """The value of a `name: value` line of fdinfo; empty when it has none."""
        _, found, rest = self.info.partition(b"\n" + name + b":")
        return rest.split(b"\n", 1)[0].strip() if found else b""

    def entry(self, kind: str, **more: Any) -> Entry:
        """The table entry of this description."""
        fds = [[fd, cloexec] for fd, cloexec in self.fds]
        return {
            "kind": kind, "fds": fds, "flags": self.flags, "dev": self.status.dev, "ino": self.status.ino, **more,
        }  # fmt: skip


@dataclass(slots=True)
class Source:
    """A stopped process whose descriptors are being inspected, or several. Use as a context manager."""

    pid: int
    limit: int = CONTENT_LIMIT
    files_stay: bool = False
    at_home: bool = False  # it is about to leave the machine where its relatives are
    kin: frozenset[int] = frozenset()  # host pids of those that go with it
    probes: list[Probe] = field(default_factory=list)
    content_seen: set[tuple[int, int]] = field(default_factory=set)
    _pidfds: dict[int, int] = field(default_factory=dict)
    _grabbed: dict[tuple[int, int], int] = field(default_factory=dict)
    _elsewhere: dict[bytes, list[bytes]] | None = None
    _mounted: dict[int, str] | None = None

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in [*self._grabbed.values(), *self._pidfds.values()]:
            os.close(fd)
        self._grabbed, self._pidfds = {}, {}

    def path(self, probe: Probe) -> bytes:
        """The magic link to the description's object."""
        return b"/proc/%d/fd/%d" % (probe.pid or self.pid, probe.fd)

    def grab(self, probe: Probe) -> int:
        """A duplicate of the description in this process. Not for files: closing it would bother their FUSE server."""
        pid = probe.pid or self.pid
        if (pid, probe.fd) not in self._grabbed:
            if pid not in self._pidfds:
                self._pidfds[pid] = process_vm.pidfd_open(pid)
            self._grabbed[pid, probe.fd] = process_vm.pidfd_getfd(self._pidfds[pid], probe.fd)
        return self._grabbed[pid, probe.fd]

    def file_system(self, probe: Probe) -> str:
        """The type of the file system that the object is on, as mount(8) says it; empty where that is not mounted."""
        if self._mounted is None:
            with open(f"/proc/{self.pid}/mountinfo", "rb") as file:
                self._mounted = mounts.types(file.read())
        return self._mounted.get(probe.status.dev, "")

    def held_elsewhere(self, probe: Probe) -> bool:
        """Whether a process that stays has the object open. Reads all of /proc/*/fd, once for all."""
        if self._elsewhere is None:
            self._elsewhere = _links_elsewhere(self.kin | {self.pid}, set(self._grabbed.values()))
        # Objects without a name of their own, like memfds, may have the same text.
        return any(_is_at(path, probe.status) for path in self._elsewhere.get(probe.link, ()))

    def same_object(self, probe: Probe) -> list[Probe]:
        """Every description of the process that is on the same object, the given one among them."""
        return [other for other in self.probes if other.status.same(probe.status)]

    def take_room(self, size: int) -> None:
        """Account for content that will travel. Raises Refusal when it is too much."""
        if size > self.limit:
            raise Refusal(f"has {size} bytes that would have to travel (limit: {self.limit} more)")
        self.limit -= size


def _is_at(path: bytes, status: Status) -> bool:
    try:
        return statx.of_path(path).same(status)
    except OSError:
        return False  # closed meanwhile


def open_elsewhere(pids: Set[int], objects: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    """Which of these objects (link, device, inode) a process other than `pids` and this one has open; reads all of
    /proc/*/fd."""
    own, links = b"/proc/%d/" % os.getpid(), _links_elsewhere(pids, set())
    for path, device, inode in objects:
        for link in links.get(os.fsencode(path), ()):
            with contextlib.suppress(OSError):  # closed meanwhile
                info = os.stat(link)
                if (info.st_dev, info.st_ino) == (device, inode) and not link.startswith(own):
                    yield path, device, inode
                    break


def _links_elsewhere(pids: Set[int], duplicates: set[int]) -> dict[bytes, list[bytes]]:
    """Link text -> /proc paths of all descriptors but those of `pids` and our own duplicates of them."""
    found: dict[bytes, list[bytes]] = {}
    for name in os.listdir(b"/proc"):
        if not name.isdigit() or int(name) in pids:
            continue
        own = int(name) == os.getpid()
        directory = b"/proc/%b/fd/" % name
        try:
            numbers = os.listdir(directory)
        except OSError:
            continue  # ended meanwhile
        for number in numbers:
            if own and int(number) in duplicates:
                continue
            try:
                found.setdefault(os.readlink(directory + number), []).append(directory + number)
            except OSError:
                continue
    return found


@dataclass(slots=True)
class Target:
    """The process that builds descriptors for another. Use as a context manager: it closes what nobody wanted.

    Attributes:
        root: descriptor of the root directory that paths mean.
        credentials: rights of the process.
        externals: key -> descriptor for what is relayed.
        pid: host pid of the process that is built.
    """

    root: int
    credentials: Credentials
    externals: dict[int, int]
    pid: int
    made: dict[Any, int] = field(default_factory=dict)
    _spare: list[int] = field(default_factory=list)
    _last: list[Callable[[], None]] = field(default_factory=list)

    def __enter__(self) -> Target:
        return self

    def finally_do(self, act: Callable[[], None]) -> None:
        """Have something done when every entry has been built."""
        self._last.append(act)

    def finish(self) -> None:
        """Do what was put off. Raises OSError."""
        for act in self._last:
            act()

    def __exit__(self, *_: object) -> None:
        for fd in self._spare:
            os.close(fd)
        self._spare = []
        os.close(self.root)

    def spare(self, fd: int) -> int:
        """Have a descriptor closed at the end."""
        self._spare.append(fd)
        return fd

    def claim(self, key: Any) -> int | None:
        """Take a descriptor that another entry made on the way; None when there is none (any more)."""
        fd = self.made.pop(key, None)
        if fd is not None and fd in self._spare:
            self._spare.remove(fd)
        return fd

    def offer(self, key: Any, fd: int) -> None:
        """Leave a descriptor for another entry to claim."""
        self.made[key] = self.spare(fd)


def reopen(fd: int, flags: int) -> int:
    """A new open file description of the same object. Raises OSError."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def open_flags(entry: Entry) -> int:
    """What of an entry's flags open(2) may be given; O_NONBLOCK is set so that it never waits."""
    keep = os.O_ACCMODE | os.O_SYNC | os.O_DSYNC | os.O_PATH | SETTABLE
    flags: int = entry["flags"]
    return flags & keep | os.O_NONBLOCK | os.O_NOCTTY


@dataclass(frozen=True, slots=True)
class Row:
    """A system call that must run inside the rebuilt process.

    Attributes:
        number: x86-64 system-call number.
        arguments: integers, or bytes: a buffer whose address is passed.
        must: whether a failure is an error.
        label: what it is about, for the error's text.
    """

    number: int
    arguments: tuple[int | bytes, ...]
    must: bool = True
    label: str = ""


def _no_rows(entry: Entry) -> Iterable[Row]:
    return ()


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table of kinds.

    Attributes:
        name: as in the entries.
        matches: whether the kind looks after a description.
        dump: makes the entry; raises Refusal.
        build: makes a descriptor in this process from the entry; raises OSError.
        rows: calls that complete it inside the process when all descriptors are in place.
    """

    name: str
    matches: Callable[[Source, Probe], bool]
    dump: Callable[[Source, Probe], Entry]
    build: Callable[[Target, Entry], int]
    rows: Callable[[Entry], Iterable[Row]] = _no_rows


def is_mode(probe: Probe, kind: int) -> bool:
    """Whether the object is of a file type (stat.S_IFREG, …)."""
    return stat.S_IFMT(probe.status.mode) == kind
