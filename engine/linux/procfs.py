"""proc(5): what the engine reads of a stopped process, parsed."""

import os
import re
import resource
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Final

_CHUNK: Final = 1 << 16
_PAGE: Final = 4096
NO_FILES: Final = ("/memfd:", "/SYSV", "/dev/", "/secretmem")  # what maps shows like files, and is none of a disk
_LIMITS: Final = 16  # RLIMIT_CPU … RLIMIT_RTTIME
_UNLIMITED: Final = 2**64 - 1
_PF_EXITING: Final = 0x4  # include/linux/sched.h
_PRESENT: Final = (b"Rss:", b"Swap:", b"Shared_Hugetlb:", b"Private_Hugetlb:")


def read(path: str, directory: int | None = None) -> bytes:
    """A whole proc file (proc hands out about a page a read). Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        parts = []
        while part := os.read(fd, _CHUNK):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Stat:
    """/proc/PID/stat: the fields we use, in the reader's pid namespace."""

    pid: int
    comm: bytes
    state: str
    ppid: int
    pgid: int
    sid: int
    flags: int
    nice: int
    threads: int
    starttime: int
    mm: tuple[
        int, ...
    ]  # start_code end_code start_stack start_data end_data start_brk arg_start arg_end env_start env_end
    policy: int
    rt_priority: int
    processor: int


def parse_stat(raw: bytes) -> Stat:
    """Parse `/proc/PID/stat` (field numbers as in proc(5))."""
    left, right = raw.index(b"("), raw.rindex(b")")
    rest = raw[right + 2 :].split()
    number = [0, 0, 0] + [int(x) for x in rest[1:]]  # index = field - 1; field 3 (state) is no number

    def get(index: int) -> int:
        return number[index - 1]

    mm = tuple(get(i) for i in (26, 27, 28, 45, 46, 47, 48, 49, 50, 51))
    return Stat(
        int(raw[: left - 1]), raw[left + 1 : right], rest[0].decode(), get(4), get(5), get(6), get(9), get(19),
        get(20), get(22), mm,
        get(41), get(40), get(39),
    )  # fmt: skip


def own_file(pid: int | str, name: str) -> str:
    """The path of a process's stat, status or statm that the kernel itself fills: for ps and top, those of
    /proc/PID may be covered by what another process does elsewhere. Times and faults in it are the first thread's."""
    return f"/proc/{pid}/task/{pid}/{name}"


def own_bytes(pid: int) -> int:
    """Bytes of memory that are a process's own, about: present, and not of a file; 0 once it has ended."""
    try:
        _, resident, shared, *_ = read(own_file(pid, "statm")).split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return (int(resident) - int(shared)) * _PAGE


def own_size(pid: int) -> int:
    """Pages of a process's address space, 0 once it ends; never waits for its memory. Raises OSError."""
    return int(read(own_file(pid, "statm")).split(None, 1)[0])


def has_ended(folder: str) -> bool:
    """Whether the thread with this /proc folder is dead: gone, or a zombie."""
    try:
        return parse_stat(read(f"{folder}/stat")).state in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def is_stopped(pid: int) -> bool:
    """Whether a process stands still by a signal of job control. Raises OSError where it is gone."""
    return read(own_file(pid, "stat")).rpartition(b") ")[2][:1] == b"T"


def parse_status(raw: bytes) -> dict[str, str]:
    """`/proc/PID/status` as key -> text."""
    result = {}
    for line in raw.decode("ascii", "surrogateescape").splitlines():
        key, _, value = line.partition(":")
        result[key] = value.strip()
    return result


@dataclass(slots=True)
class Vma:
    """One mapping. `prot` as PROT_*; `path` as the kernel prints it, '' for anonymous memory."""

    start: int
    end: int
    prot: int
    shared: bool
    offset: int
    major: int
    minor: int
    inode: int
    path: str
    flags: frozenset[str] = field(default_factory=frozenset)  # VmFlags of smaps, empty when not read

    @property
    def deleted(self) -> bool:
        """The file has been unlinked."""
        return self.path.endswith(" (deleted)")


# What `show_map_vma` of fs/proc/task_mmu.c prints; VmFlags end a mapping's lines in smaps.
_HEAD: Final = r"^([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)\n"
_maps: Final = re.compile(_HEAD, re.MULTILINE)
_smaps: Final = re.compile(_HEAD + r"(?:[A-Z].*\n)*?VmFlags: ?(.*)\n", re.MULTILINE)


@lru_cache(maxsize=256)
def _flags(words: str) -> frozenset[str]:
    return frozenset(words.split())


def _parse_mappings(form: re.Pattern[str], raw: bytes) -> list[Vma]:
    found = []
    for first, last, perms, offset, major, minor, inode, path, *flags in form.findall(os.fsdecode(raw)):
        if path == "[vsyscall]":
            continue
        prot = (perms[0] == "r") | (perms[1] == "w") << 1 | (perms[2] == "x") << 2
        if "\\" in path:
            path = path.replace("\\012", "\n")
        vma = Vma(
            int(first, 16), int(last, 16), prot, perms[3] == "s", int(offset, 16), int(major, 16), int(minor, 16),
            int(inode), path,
        )  # fmt: skip
        if flags:
            vma.flags = _flags(flags[0])
        found.append(vma)
    return found


def parse_maps(raw: bytes) -> list[Vma]:
    """`/proc/PID/maps` without the vsyscall page."""
    return _parse_mappings(_maps, raw)


def parse_smaps(raw: bytes) -> list[Vma]:
    """`/proc/PID/smaps`: the same with VmFlags."""
    return _parse_mappings(_smaps, raw)


def huge_page_sizes(raw: bytes) -> dict[int, int]:
    """Bytes of a page in the mappings of `/proc/PID/smaps` that have others than most: start -> size."""
    found: dict[int, int] = {}
    start = 0
    for line in raw.splitlines():
        if line[:1] in b"0123456789abcdef":
            start = int(line.split(b"-", 1)[0], 16)
        elif line.startswith(b"KernelPageSize:") and (size := int(line.split()[1]) << 10) != _PAGE:
            found[start] = size
    return found


def touched(raw: bytes) -> list[tuple[int, int]]:
    """(start, end) of the mappings in `/proc/PID/smaps` that have pages in memory or in swap."""
    found: list[tuple[int, int]] = []
    span = (0, 0)
    for line in raw.splitlines():
        if line[:1] in b"0123456789abcdef":
            first, last = line.split(b" ", 1)[0].split(b"-")
            span = (int(first, 16), int(last, 16))
        elif line.startswith(_PRESENT) and line.split()[1] != b"0" and found[-1:] != [span]:
            found.append(span)
    return found


def read_limits(pid: int) -> list[tuple[int, int]]:
    """(soft, hard) by RLIMIT_ number; 2**64 - 1 is unlimited.

    prlimit(2) is the quicker way, and wants CAP_SYS_RESOURCE for other users' processes, which not every root has.
    """
    with suppress(PermissionError):
        pairs = [resource.prlimit(pid, which) for which in range(_LIMITS)]
        return [(soft & _UNLIMITED, hard & _UNLIMITED) for soft, hard in pairs]
    found = []
    for line in read(f"/proc/{pid}/limits").decode().splitlines()[1:]:
        # Columns of fixed width, fs/proc/base.c: the name's 25, then 21 each.
        soft, hard = line[25:46].strip(), line[46:67].strip()
        found.append((_limit(soft), _limit(hard)))
    return found


def _limit(word: str) -> int:
    return _UNLIMITED if word == "unlimited" else int(word)


@dataclass(frozen=True, slots=True)
class PosixTimer:
    """One block of /proc/PID/timers."""

    identifier: int
    signal: int
    value: int
    notify: int  # SIGEV_SIGNAL 0, SIGEV_NONE 1, SIGEV_THREAD_ID 4
    tid: int
    clock: int


def parse_timers(raw: bytes) -> list[PosixTimer]:
    """`/proc/PID/timers`."""
    timers = []
    for block in ("\n" + raw.decode()).split("\nID: ")[1:]:
        lines = block.splitlines()
        fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        number, _, value = fields["signal"].partition("/")
        how, _, target = fields["notify"].partition("/")
        tid = int(target.partition(".")[2])
        kind = {"none": 1, "signal": 0, "thread": 2}[how] | (4 if target.startswith("tid") else 0)
        timers.append(PosixTimer(int(lines[0]), int(number), int(value, 16), kind, tid, int(fields["ClockID"])))
    return timers


def threads(pid: int) -> list[int]:
    """Thread ids of a process, in creation order."""
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def is_exiting(pid: int) -> bool:
    """Whether a process and all that descend from it have run their last instruction, and only the kernel is busy with
    their end."""
    try:
        for tid in threads(pid):
            if not parse_stat(read(f"/proc/{pid}/task/{tid}/stat")).flags & _PF_EXITING:
                return False
    except (FileNotFoundError, ProcessLookupError):
        pass  # gone meanwhile
    return all(is_exiting(child) for child in children(pid))


def children(pid: int) -> list[int]:
    """Pids of the children of all threads of a process, zombies included; none when it has ended.

    Of a process that runs it is a forecast: who is born or handed on meanwhile may be missed.
    """
    if not _has_children_files():
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and _parent(name) == pid]
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for tid in threads(pid):
            with suppress(FileNotFoundError, ProcessLookupError):  # this thread has ended
                found += [int(word) for word in read(f"/proc/{pid}/task/{tid}/children").split()]
    return found


@cache
def _has_children_files() -> bool:
    return os.path.exists("/proc/thread-self/children")  # CONFIG_PROC_CHILDREN


def _parent(name: str) -> int:
    try:
        return parse_stat(read(own_file(name, "stat"))).ppid
    except (FileNotFoundError, ProcessLookupError):
        return -1


def inner_pid(status: dict[str, str]) -> int:
    """The process's pid in its innermost pid namespace."""
    return int(status.get("NSpid", status["Pid"]).split()[-1])
