"""A frozen process as an image: look at everything, say what cannot move, then stream it."""

import functools
import operator
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

from engine import cpu, facts, owed, placeholders, reserve, vdso
from engine import image as img
from engine.descriptors import Descriptors
from engine.descriptors import inspect as inspect_descriptors
from engine.descriptors.kin import Kin
from engine.descriptors.model import CONTENT_LIMIT, Entry
from engine.descriptors.relatives import kept_by_descendants
from engine.foresight import Recheck
from engine.freeze import Frozen, InVfork, freeze, in_vfork, unseized
from engine.image import Image
from engine.linux import procfs, ptrace
from engine.memory import Survey, pack_runs, send_pages
from engine.obstacles import children_of, obstacles
from engine.precopy import Rounds
from engine.spans import Spans, size
from engine.staging import Keep
from engine.state import Asked, ask, ask_thread, credentials, limits, thread_state


@dataclass(slots=True)
class Inspection:
    """What is known of a frozen process before it is sent.

    Attributes:
        refusals: why it cannot move; empty when it can.
        externals: descriptors to be relayed (contract: key, fds, kind, …).
        left: those of `runs` that have not been sent ahead.
        keep: what the destination keeps of what has; None: nothing has been sent ahead.
        later: what is not sent with the image, but when the copy runs.
        recheck: of what all this rests on; None: it needs none.
        picked: those of `runs` that are sent; None: all.
    """

    frozen: Frozen
    stat: procfs.Stat
    descriptors: Descriptors
    survey: Survey
    runs: list[tuple[int, int]]
    refusals: list[str] = field(default_factory=list)
    left: list[tuple[int, int]] = field(default_factory=list)
    keep: Keep | None = None
    later: Spans = field(default_factory=list)
    recheck: Recheck | None = None
    picked: list[tuple[int, int]] | None = None
    _children: list[int] = field(default_factory=list)

    @property
    def externals(self) -> list[dict[str, Any]]:
        """Open file descriptions that only a relay can carry."""
        return self.descriptors.externals

    @property
    def owed(self) -> int:
        """Bytes that come later, about."""
        present = owed.own_bytes(self.frozen) - _bytes(self.runs)
        return max(min(present, size(self.later)), 1)

    def pick(self, image: Image, ahead: bool) -> None:
        """Settle which pages are sent; `ahead`: to the destination that has what was sent ahead."""
        self.picked = self.left if ahead and self.keep is not None else self.runs
        image.runs, image.total = pack_runs(self.picked), _bytes(self.picked)

    def is_needed(self, init: int, leaving: Container[int] = ()) -> bool:
        """Whether relatives that stay need something in its place (`engine.placeholders.is_needed`)."""
        self._children = [child for child, *_ in children_of(self.frozen)]
        return placeholders.is_needed(init, procfs.inner_pid(self.frozen.status), self._children, leaving)

    def end_stand_ins(self, init: int) -> None:
        """It has left and is stood for: what stood for its children that are elsewhere has nobody to wait for it."""
        reserve.reserve(init, reserve.end_stand_ins(init, self._children))

    def summary(self) -> dict[str, Any]:
        """The `process` map of the worker's inspect reply."""
        with open(f"/proc/{self.frozen.pid}/cmdline", "rb", buffering=0) as file:
            cmdline = file.read().split(b"\0")[:-1]
        return self.outline() | {
            "cmdline": cmdline, "bytes": _bytes(self.runs), "left": _bytes(self.left),
            "pid": procfs.inner_pid(self.frozen.status),
            "highest_tid": max(procfs.inner_pid(self.frozen.status_of(thread)) for thread in self.frozen.threads),
        }  # fmt: skip

    def outline(self) -> dict[str, Any]:
        """The part of it that `outlook` foresees."""
        return _outline(self.frozen, self.stat)


def outlook(pid: int) -> dict[str, Any]:
    """Of a process that runs, what others prepare for: who it is, and whose relative. Raises OSError."""
    running = unseized(pid)
    stat = procfs.parse_stat(procfs.read(f"{running.live}/stat"))
    running.group_stopped = stat.state == "T"
    return _outline(running, stat)


def _outline(process: Frozen, stat: procfs.Stat) -> dict[str, Any]:
    status = process.status
    uid, euid, *_ = (int(word) for word in status["Uid"].split())
    pgid, sid = (int(status[key].split()[-1]) for key in ("NSpgid", "NSsid"))  # as it has them itself
    return {
        "comm": stat.comm, "uid": uid, "gid": int(status["Gid"].split()[0]), "euid": euid, "ppid": stat.ppid,
        "pgid": pgid, "sid": sid, "stopped": process.group_stopped, "children": children_of(process),
        "rights": int(status["CapPrm"], 16),
    }  # fmt: skip


def _bytes(runs: list[tuple[int, int]]) -> int:
    return sum(length for _, length in runs)


def inspect(
    frozen: Frozen,
    there: dict[str, Any] | None = None,
    close: bool = False,
    family: bool = False,
    at_home: bool = False,
    rounds: Rounds | None = None,
    contents: int = CONTENT_LIMIT,
    digests: bool = False,
    lazy: bool = False,
    foreseen: bytes = b"",
    kin: Kin | None = None,
    bare: bool = False,
) -> Inspection:
    """Look at a settled process without touching it; collect every obstacle.

    Args:
        there: of `engine.facts.unlike`, where the destination is not like this machine.
        close: what cannot move of its sockets and the like does not arrive, instead of being in the way.
        family: children may stay behind where the daemon can look after them.
        at_home: it leaves the master.
        rounds: in which its memory was sent ahead.
        contents: bytes of open files without a name that may travel.
        digests: files are known by their content.
        lazy: what can of its memory comes after it.
        foreseen: its smaps a moment ago; else they are read now.
        kin: what it shares with others that move with it.
        bare: it stands at its exec, and its memory does not move.

    Raises:
        OSError: the process ended meanwhile, or a kernel interface failed.
    """
    # At once: while it is read, no call that changes mappings gets through, nor does brk(2).
    recheck = Recheck(frozen, foreseen) if rounds is not None and foreseen else None
    differences = facts.obstacles(frozen, there) if there else []
    stat = procfs.parse_stat(procfs.read(f"{frozen.live}/stat"))
    refusals = obstacles(frozen, stat, family)
    survey = Survey(frozen, rounds.marks if rounds is not None else None, digests, foreseen, kin, bare)
    files_stay = bool(there and there.get("bare"))
    descriptors = inspect_descriptors(
        frozen.pid, tid=frozen.threads[0].tid, content_limit=contents, close=close, files_stay=files_stay,
        at_home=at_home, shared=kin,
    )  # fmt: skip
    carried = {(entry["dev"], entry["ino"]) for entry in descriptors.table if entry["kind"] in ("memfd", "deleted")}
    if kin is not None:
        carried |= kin.memory.keys()
    if family and not at_home and kin is None:
        refusals += kept_by_descendants(frozen.pid, descriptors.externals)
    refusals += survey.refusals + descriptors.refusals + differences
    later = owed.choose(frozen, survey) if lazy else []
    runs = survey.runs(carried, later) if not bare else []
    seen = Inspection(frozen, stat, descriptors, survey, runs, refusals, later=later)
    seen.recheck = recheck if survey.foreseen else None
    if rounds is not None:
        seen.left, seen.keep = rounds.settle(survey, seen.runs)
    return seen


def forecast(pid: int, close: bool, at_home: bool, contents: int = CONTENT_LIMIT) -> list[str]:
    """Obstacles that can be seen of a process that runs; the freeze may show others.

    Args:
        close, at_home, contents: as for `inspect`.

    Raises:
        OSError: it is gone.
    """
    running = unseized(pid)
    stat = procfs.parse_stat(procfs.read(f"{running.live}/stat"))
    descriptors = inspect_descriptors(pid, content_limit=contents, close=close, at_home=at_home)
    return obstacles(running, stat, family=True) + Survey(running).refusals + descriptors.refusals


def obstacles_of(pid: int, family: bool = False, at_home: bool = False, contents: int = CONTENT_LIMIT) -> list[str]:
    """Every obstacle of a process that nobody holds; it is stopped for a moment to look, if that is possible.

    Args:
        family, at_home, contents: as for `inspect`.

    Raises:
        OSError: there is no such process.
    """
    try:
        if in_vfork(pid):
            raise InVfork
        frozen = freeze(pid)
    except (PermissionError, InVfork) as error:
        # Held by another tracer, or it would not stop: what it is made of can be seen all the same.
        frozen = unseized(pid)
        stat = procfs.parse_stat(procfs.read(f"{frozen.live}/stat"))
        descriptors = inspect_descriptors(pid, content_limit=contents, at_home=at_home)
        found = obstacles(frozen, stat, family) + Survey(frozen).refusals + descriptors.refusals
        if family and not at_home:
            found += kept_by_descendants(pid, descriptors.externals)
        return [str(error.strerror), *found]
    try:
        return inspect(frozen, family=family, at_home=at_home, contents=contents).refusals
    finally:
        frozen.release()


def _doubtful(table: list[Entry]) -> list[int]:
    # TIOCGPTPEER keeps O_CLOEXEC among the flags of the open file, as no open(2) does: for /proc/PID/fdinfo each
    # duplicate of such a terminal is close-on-exec. Terminal emulators use it.
    return [number for entry in table if entry["kind"] == "external" for number, cloexec in entry["fds"] if cloexec]


def _correct(table: list[Entry], cloexec: dict[int, bool]) -> None:
    for entry in table:
        entry["fds"] = [[number, cloexec.get(number, said)] for number, said in entry["fds"]]


def build(inspection: Inspection) -> Image:
    """The image but its pages: `describe`, and `add_state`. Raises OSError."""
    image = describe(inspection)
    add_state(inspection, image)
    return image


def describe(inspection: Inspection) -> Image:
    """What can be said of the process without asking it: META of the image. Raises OSError."""
    frozen, survey, stat = inspection.frozen, inspection.survey, inspection.stat
    status = frozen.status
    exe, cwd = survey.add_link("exe"), survey.add_link("cwd")
    inner = [int(x) for x in (status[key].split()[-1] for key in ("NSpid", "NSpgid", "NSsid"))]
    busy = [int(status[key], 16) for key in ("SigCgt", "SigIgn", "ShdPnd")]
    busy += [int(frozen.status_of(thread)["SigPnd"], 16) for thread in frozen.threads]
    return Image(
        pid=inner[0],
        ppid=stat.ppid,
        pgid=inner[1],
        sid=inner[2],
        stopped=frozen.group_stopped,
        comm=stat.comm,
        vdso=vdso.DIGEST,
        vdso_code=vdso.PACKED,
        special=survey.special,
        relics=[relic.plain() for relic in vdso.find_relics(frozen.pid, survey.bare_code)],
        cpu=cpu.packed(),
        fresh=frozen.fresh,
        files=survey.files,
        exe=exe,
        cwd=cwd,
        regions=survey.regions,
        runs=pack_runs(inspection.runs),
        mm=list(stat.mm),
        auxv=procfs.read(f"{frozen.live}/auxv"),
        credentials=credentials(status),
        busy_signals=functools.reduce(operator.or_, busy),
        descriptors=inspection.descriptors.table,
        frozen_ns=0,  # known when it is written
        total=_bytes(inspection.runs),
    )


def add_state(inspection: Inspection, image: Image) -> None:
    """The rest: what the process itself has to be asked, by one batch of injected calls. Raises OSError."""
    frozen = inspection.frozen
    asked: Asked = ask(frozen, inspection.stat.flags, _doubtful(inspection.descriptors.table))
    _correct(inspection.descriptors.table, asked.cloexec)
    leader = frozen.threads[0]
    own = asked.altstack, asked.clear_tid, asked.timer_slack, asked.switches
    image.threads = [thread_state(frozen, leader, image.pid, *own)]
    for thread in frozen.threads[1:]:
        inner_tid = procfs.inner_pid(frozen.status_of(thread))
        image.threads.append(thread_state(frozen, thread, inner_tid, *ask_thread(frozen, thread)))
    numbers = {thread.tid: one.tid for thread, one in zip(frozen.threads, image.threads, strict=True)}
    for timer in asked.timers:
        timer[4] = numbers.get(timer[4], 0)
    image.shared_pending = ptrace.queued_signals(leader.tid, shared=True)
    for name in (
        "actions", "itimers", "timers", "brk", "securebits", "personality", "dumpable", "death_signal", "subreaper",
        "thp_disabled", "lock_future", "barriers", "memory_merge", "machine_checks",
    ):  # fmt: skip
        setattr(image, name, getattr(asked, name))
    image.limits = limits(frozen.pid)
    image.umask = int(frozen.status["Umask"], 8)
    image.oom_score_adj = int(procfs.read(f"{frozen.live}/oom_score_adj"))
    image.core_filter = int(procfs.read(f"/proc/{frozen.pid}/coredump_filter") or b"0", 16)


def write(
    inspection: Inspection, image: Image, send: Callable[[bytes | memoryview], object],
    send_part: Callable[[memoryview], object] | None = None, pages_first: bool = False,
) -> tuple[int, float]:  # fmt: skip
    """Stream an image that may still lack its state, and the pages, these by `send_part`.

    Args:
        pages_first: the destination builds at once: it can fill the memory while the process is asked.

    Returns (bytes of pages, ms). Raises OSError.
    """
    began = time.monotonic()
    image.frozen_ns = round((began - inspection.frozen.settled) * 1e9)
    if not image.threads and _doubtful(image.descriptors):
        add_state(inspection, image)
    send(img.frame(img.META, img.encode(image)))
    frozen, total, later = inspection.frozen, 0, pages_first and not image.threads
    pages = inspection.runs if inspection.picked is None else inspection.picked
    if later:
        send(img.frame(img.LATER, b""))
        total = send_pages(frozen.pid, frozen.memory, pages, send_part or send)
    if not image.threads:  # while the destination is at work
        add_state(inspection, image)
    send(img.frame(img.STATE, img.encode_state(image)))
    if not later:
        total = send_pages(frozen.pid, frozen.memory, pages, send_part or send)
    send(img.frame(img.END, total.to_bytes(8, "little")))
    return total, (time.monotonic() - began) * 1000
