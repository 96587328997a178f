"""A process that stands at its exec, as an order to make that exec elsewhere.

At its exec a process is little more than its program, its arguments and what an exec leaves alone. So another machine
need not rebuild it: a child of its nodeinit makes the system calls that are listed here, of which execve is the last
(csrc/bear.h), and the kernel there does the rest. That takes a sixth of the time. What an exec cannot bring about (open
files that are no relay's, pending signals, files that are known by their content) gives no order: there is the image.
"""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import dataclass, field
from typing import Any, Final

from engine import image as img
from engine import state
from engine.freeze import Frozen
from engine.linux import procfs
from engine.linux.x86_64 import NR
from engine.restore_state import credential_rows

NULL: Final = -1
_NULL_DEVICE: Final = os.makedev(1, 3)
ORDER_MAX: Final = 120_000  # bytes; what is longer goes as an image, or by itself
_AT_EXECFN: Final = 31  # <linux/auxvec.h>
_SCRIPT_WORDS: Final = 4  # an interpreter's words before the script; the kernel follows few that are scripts themselves
_SIG_SETMASK: Final = 2
_WHO_PROCESS: Final = 1  # of ioprio_set(2)
_STRINGS_END: Final = (1 << 64) - 1
_ALL: Final = (1 << 64) - 1
# csrc/nodeinit.h
_TABLE: Final = struct.Struct("=4I")
_FILE: Final = struct.Struct("=4Q2I")
_ROW: Final = struct.Struct("=IB6s5x6Q")
_VALUE, _ADDRESS, _STRINGS, _PASSED, _OPENED = range(5)


@dataclass(frozen=True, slots=True)
class Order:
    """What `write` gives.

    Attributes:
        table: struct birth_table and all behind it.
        keys: of the externals, in the order in which their descriptors are passed; from NULL downwards: /dev/null, open
            for reading, for writing, for both.
        rank: [offset, bytes of room] of the value of BPROC_RANK; None: it has none.
    """

    table: bytes
    keys: list[int]
    rank: list[int] | None


@dataclass(frozen=True, slots=True)
class _Argument:
    kind: int
    value: int


@dataclass(slots=True)
class _Table:
    """Gathers calls as `engine.runner.Calls` does."""

    blob: bytearray = field(default_factory=bytearray)
    rows: list[tuple[int, bool, list[_Argument]]] = field(default_factory=list)

    def data(self, content: bytes) -> Any:
        """Bytes that calls point to."""
        self.blob += bytes(-len(self.blob) % 8)
        at = len(self.blob)
        self.blob += content
        return _Argument(_ADDRESS, at)

    def strings(self, words: list[bytes]) -> _Argument:
        """Pointers to strings, as execve(2) takes them."""
        at = [self.data(word + b"\0").value for word in words]
        self.data(b"")
        vector = _Argument(_STRINGS, len(self.blob))
        for offset in [*at, _STRINGS_END]:
            self.blob += struct.pack("<Q", offset)
        self.vectors.append((vector.value, len(at)))
        return vector

    vectors: list[tuple[int, int]] = field(default_factory=list)

    def add(self, call: str | int, *arguments: Any, must: bool = True, label: str = "") -> int:
        """Add one call. Returns its number."""
        del label
        number = NR[call] if isinstance(call, str) else call
        self.rows.append((number, must, [a if isinstance(a, _Argument) else _Argument(_VALUE, a) for a in arguments]))
        return len(self.rows) - 1

    def write(self, path: bytes, text: bytes) -> None:
        """Add what writes a text to a file of /proc."""
        self.add("open", self.data(path + b"\0"), os.O_WRONLY | os.O_CLOEXEC, 0, must=False)
        self.add("write", _Argument(_OPENED, 0), self.data(text), len(text), must=False)
        self.add("close", _Argument(_OPENED, 0), must=False)

    def pack(self, files: list[img.MappedFile], high: int) -> tuple[bytes, int]:
        """The bytes, and where in them the blob begins."""
        paths = [self.data(file.path + b"\0").value for file in files]
        base = _TABLE.size + _FILE.size * len(files) + _ROW.size * len(self.rows)
        for at, count in self.vectors:
            for index in range(count):
                place = at + 8 * index
                (offset,) = struct.unpack_from("<Q", self.blob, place)
                struct.pack_into("<Q", self.blob, place, offset + base)
        packed = [_TABLE.pack(len(files), len(self.rows), high, 0)]
        for file, path in zip(files, paths, strict=True):
            device = file.device
            packed.append(
                _FILE.pack(path + base, file.inode, file.size, file.mtime_ns, os.major(device), os.minor(device))
            )
        packed += [_pack_row(number, must, arguments, base) for number, must, arguments in self.rows]
        return b"".join([*packed, self.blob]), base


def _pack_row(number: int, must: bool, arguments: list[_Argument], base: int) -> bytes:
    kinds = bytes(argument.kind for argument in arguments).ljust(6, b"\0")
    values = [(a.value + (base if a.kind in (_ADDRESS, _STRINGS) else 0)) & _ALL for a in arguments]
    return _ROW.pack(number, must, kinds, *values, *[0] * (6 - len(values)))


def write(frozen: Frozen, image: img.Image, externals: list[dict[str, Any]], arguments: list[bytes]) -> Order | None:
    """The order; None where there can be none.

    Args:
        frozen: at its exec.
        image: the same, whole but for its pages.
        externals: what of it is relayed.
        arguments: of its program.

    Raises:
        OSError: it has ended.
    """
    command = _command(frozen, arguments)
    files = _mapped(image)
    if command is None or not _is_plain(image, files, externals):
        return None
    environment = procfs.read(f"/proc/{frozen.pid}/environ").split(b"\0")[:-1]
    table = _Table()
    _settings(table, image)
    keys = _descriptors(table, image)
    table.add("chdir", table.data(image.files[image.cwd].path + b"\0"))
    for number, action in image.actions.items():
        table.add("rt_sigaction", number, table.data(action), 0, 8, must=False)
    credential_rows(table, image)
    table.add("rt_sigprocmask", _SIG_SETMASK, table.data(struct.pack("<Q", image.threads[0].mask)), 0, 8)
    path, words = command
    environ = table.strings(environment)
    table.add("execve", table.data(path + b"\0"), table.strings(words), environ)
    high = max([2, *(number for entry in image.descriptors for number, _ in entry["fds"])]) + 1
    packed, base = table.pack(files, high)
    return Order(packed, keys, _rank(packed, environment, environ.value + base)) if len(packed) <= ORDER_MAX else None


def files_of(image: img.Image) -> list[bytes]:
    """The paths of the files that the exec takes."""
    return [file.path for file in _mapped(image) if not file.nameless]


def _mapped(image: img.Image) -> list[img.MappedFile]:
    return [file for index, file in enumerate(image.files) if index != image.cwd]


def _is_plain(image: img.Image, files: list[img.MappedFile], externals: list[dict[str, Any]]) -> bool:
    """Whether it has nothing that an exec cannot bring about."""
    leader = image.threads[0]
    return not (
        image.stopped or leader.pending or image.shared_pending or image.timers or image.lock_future
        or not all(entry["kind"] == "external" or _is_null(entry) for entry in image.descriptors)
        or any(external["kind"] == "tty" for external in externals)
        or any(file.digest or file.nameless or file.writable for file in files)
    )  # fmt: skip


def _command(frozen: Frozen, arguments: list[bytes]) -> tuple[bytes, list[bytes]] | None:
    """What to exec: of a script that itself, whose interpreter's arguments the kernel has put before its own."""
    auxv = procfs.read(f"{frozen.live}/auxv")
    pairs = dict(struct.iter_unpack("<QQ", auxv[: len(auxv) // 16 * 16]))
    if _AT_EXECFN not in pairs:
        return None
    path = os.pread(frozen.memory, os.pathconf("/", "PC_PATH_MAX"), pairs[_AT_EXECFN]).split(b"\0")[0]
    try:
        found, program = os.stat(os.path.join(b"/proc/%d/cwd" % frozen.pid, path)), os.stat(f"/proc/{frozen.pid}/exe")
    except OSError:
        return None
    if os.path.samestat(found, program):
        return path, arguments
    before = arguments[1 : 1 + _SCRIPT_WORDS]
    return (path, [path, *arguments[before.index(path) + 2 :]]) if path in before else None


def _settings(table: _Table, image: img.Image) -> None:
    """What is set while it has the rights to, and the exec keeps."""
    leader = image.threads[0]
    table.add("prctl", state.PR_SET_NAME, table.data(leader.comm + b"\0"))  # it is no placeholder
    table.write(b"/proc/self/oom_score_adj", b"%d" % image.oom_score_adj)
    table.write(b"/proc/self/coredump_filter", b"%#x" % image.core_filter)
    table.add("sched_setattr", 0, table.data(leader.policy), 0, must=False)
    if leader.affinity:
        table.add("sched_setaffinity", 0, 128, table.data(_cpus(leader.affinity)), must=False)
    table.add("ioprio_set", _WHO_PROCESS, 0, leader.io_priority, must=False)
    table.add("prctl", state.PR_SET_TIMERSLACK, leader.timer_slack, must=False)
    table.add("umask", image.umask)
    if image.subreaper:
        table.add("prctl", state.PR_SET_CHILD_SUBREAPER, 1)
    if image.thp_disabled:
        table.add("prctl", state.PR_SET_THP_DISABLE, image.thp_disabled, 0, 0, 0)
    if image.machine_checks != state.MCE_DEFAULT:
        table.add("prctl", state.PR_MCE_KILL, state.PR_MCE_KILL_SET, image.machine_checks, 0, 0, must=False)
    if image.memory_merge:
        table.add("prctl", state.PR_SET_MEMORY_MERGE, 1, 0, 0, 0, must=False)
    for which, value in enumerate(image.itimers):
        if any(value):
            table.add("setitimer", which, table.data(value), 0)
    for which, limits in enumerate(image.limits):
        table.add("prlimit64", 0, which, table.data(struct.pack("<QQ", *limits)), 0, must=False)


def _cpus(numbers: list[int]) -> bytes:
    return sum(1 << number for number in numbers if number < 1024).to_bytes(128, "little")


def _descriptors(table: _Table, image: img.Image) -> list[int]:
    keys: list[int] = []
    for entry in image.descriptors:
        for number, _ in entry["fds"]:
            table.add("dup3", _Argument(_PASSED, len(keys)), number, 0)
        if _is_null(entry):
            table.add("fcntl", entry["fds"][0][0], fcntl.F_SETFL, entry["flags"], must=False)
            keys.append(NULL - (entry["flags"] & os.O_ACCMODE))
        else:
            keys.append(int(entry["key"]))
    return keys


def _is_null(entry: dict[str, Any]) -> bool:
    return bool(entry["kind"] == "device" and entry["rdev"] == _NULL_DEVICE and not entry.get("locks"))


def _rank(packed: bytes, environment: list[bytes], vector: int) -> list[int] | None:
    name = b"BPROC_RANK="
    for index, word in enumerate(environment):
        if word.startswith(name):
            (at,) = struct.unpack_from("<Q", packed, vector + 8 * index)
            return [at + len(name), len(word) - len(name)]
    return None
