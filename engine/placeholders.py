"""Gives a process that arrives on a node its parent, group and session, though their leaders run elsewhere.

A *placeholder* is a tiny process (a clone of nodeinit) with the pid of a parent, group leader or session leader that is
not on this node. Under it, getppid, getpgrp, getsid, job-control stops and wait are the kernel's own.

Session and group are inherited at birth, so the order matters: session leader, group leader, parent, process. The
group's leader is a child of the session's: a group without a member whose parent is in another group of the same
session is orphaned, and the kernel discards SIGTSTP for it.

A process that was forked here and has left is stood for as long as it lives, or the node would give its pid away again.

There is no state beside the kernel's: whatever exists in the job namespace is read there, so daemon and workers agree.
A lock on the namespace itself (flock on its nsfs file) keeps them apart.
"""

from __future__ import annotations

import enum
import fcntl
import os
import select
import signal
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from engine.linux import nsfs, pidfd, process_vm, procfs

INIT = 1  # nodeinit's pid in its namespace
COMMAND_SIGNAL = 64  # SIGRTMAX, see csrc/nodeinit.h
_NAMES = (b"nodeinit", b"nodeinit-halted")  # of placeholders; the other one is told to stop
_RETRY_S = 0.05
_DEATH_S = 0.5  # a placeholder's end takes some 50 us
_PATIENCE_S = 5.0  # one placeholder takes about 0.1 ms
_YIELDS = 50  # looks for a placeholder, some 30 us each, before sleeping between them


class Command(enum.IntFlag):
    """What nodeinit and its clones do on COMMAND_SIGNAL (csrc/nodeinit.h)."""

    NONE = 0
    SETSID = 1 << 24
    SETPGID = 2 << 24
    SIBLING = 4 << 24
    KILL_ALL = 8 << 24
    TERMINAL = 16 << 24  # the number is that of the terminal in /dev/pts
    END = 32 << 24  # the number is a wait status, to end with
    STOP = 64 << 24  # the number is a signal, to stop by
    SEND = 128 << 24  # the number is the receiver of a signal; 0: what comes with it is the value of that signal
    LEASE = TERMINAL | SIBLING  # a time comes with it, by which all are to end
    BEAR = TERMINAL | SETSID  # a packet waits, see engine/bearing.py
    FOREGROUND = TERMINAL | SETPGID  # the number is the group that its terminal's foreground shall be


@dataclass(frozen=True, slots=True)
class Ids:
    """One process as its namespace sees it. `placeholder`: it runs nodeinit's program and nobody traces it."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    placeholder: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """`maker` makes placeholder `pid`; when both are the same, it becomes a leader itself."""

    maker: int
    pid: int
    command: Command


@dataclass(frozen=True, slots=True)
class Birth:
    """How the process itself is to be born.

    Attributes:
        maker: job pid of the process that must clone it.
        sibling: clone with CLONE_PARENT.
        setsid: the child must call setsid().
        pgid: the child must call setpgid(0, pgid); None: it is in the right group.
    """

    maker: int
    sibling: bool
    setsid: bool
    pgid: int | None


class World:
    """What exists in a job namespace, read from its own /proc as far as it is asked for."""

    def __init__(self, init: int) -> None:
        self._init = init
        self._proc = os.open(f"/proc/{init}/root/proc", os.O_PATH | os.O_CLOEXEC)
        self._namespace = nsfs.open_pid_namespace(init)
        self._exe: tuple[int, int] | None = None
        self._made: dict[int, Ids] = {}
        self._everybody: list[Ids] | None = None

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._proc)
        os.close(self._namespace)

    def get(self, pid: int) -> Ids | None:
        """The process, or None when no living process has this pid."""
        return self._made.get(pid) or self._read(pid)

    def every(self) -> list[Ids]:
        """Every living process of the namespace, when this was first asked for."""
        if self._everybody is None:
            self._everybody = self._read_all()
        return self._everybody

    def _read_all(self) -> list[Ids]:
        listing = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._proc)
        try:
            names = os.listdir(listing)
        finally:
            os.close(listing)
        found = (self._read(int(name)) for name in names if name.isdigit())
        return [ids for ids in found if ids]

    def add(self, ids: Ids) -> None:
        """Count on a process that a step is going to make."""
        self._made[ids.pid] = ids

    def group_and_session(self, pid: int) -> tuple[int, int] | None:
        """Of a process that lives, without a look at whether it is a placeholder; None when it does not."""
        seen = None if self._is_absent(pid) else self._stat(pid)
        return (int(seen[1][2]), int(seen[1][3])) if seen else None

    def _stat(self, pid: int) -> tuple[bytes, list[bytes]] | None:
        comm, found, rest = self._text(f"{pid}/stat").rpartition(b") ")
        fields = rest.split(None, 4)
        return (comm.rpartition(b"(")[2], fields) if found and fields[0] not in (b"Z", b"X") else None

    def _read(self, pid: int) -> Ids | None:
        seen = None if self._is_absent(pid) else self._stat(pid)
        if not seen:
            return None
        comm, fields = seen
        placeholder = pid != INIT and comm in _NAMES and self._is_clone(pid)
        return Ids(pid, int(fields[1]), int(fields[2]), int(fields[3]), placeholder)

    def _is_absent(self, pid: int) -> bool:
        # A tenth of the time of a look at its files: that is how one that is being made is waited for.
        try:
            return nsfs.outer_pid(self._namespace, pid) is None
        except NotImplementedError:
            return False

    def _is_clone(self, pid: int) -> bool:
        try:
            own = self._exe = self._exe or self._exe_of(INIT)
            return self._exe_of(pid) == own and not self._is_traced(pid)
        except OSError:
            return False  # ended meanwhile

    def _is_traced(self, pid: int) -> bool:
        # A process in the making runs nodeinit's program, too, but has a tracer. The namespace's own /proc does not
        # show it: the tracer has no pid there, so TracerPid reads 0. The caller's does.
        outer = outer_pid(self._init, self._namespace, pid)
        if outer is None:
            return True
        return b"\nTracerPid:\t0\n" not in procfs.read(procfs.own_file(outer, "status"))

    def _exe_of(self, pid: int) -> tuple[int, int]:
        status = os.stat(f"{pid}/exe", dir_fd=self._proc)
        return status.st_dev, status.st_ino

    def _text(self, path: str) -> bytes:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        except FileNotFoundError:
            return b""
        try:
            return os.read(fd, 4096)
        except ProcessLookupError:
            return b""
        finally:
            os.close(fd)


def plan(world: World, pid: int, ppid: int, pgid: int, sid: int) -> tuple[list[Step], Birth]:
    """Work out which placeholders are missing and how the process is to be born under them.

    Ids 0 and 1 are outside of what the cluster knows, and map to nodeinit. A process whose parent is in another session
    than its own (an orphan that a subreaper adopted) gets nodeinit as its parent.

    Raises:
        FileExistsError: the pid is in use on this node.
    """
    if world.get(pid):
        raise FileExistsError(17, f"pid {pid} is in use on this node")
    steps: list[Step] = []
    session = _session(world, pid, sid, steps)
    group = _group(world, pid, pgid, session, steps)
    return steps, _birth(world, pid, ppid, session, group, steps)


def _session(world: World, pid: int, sid: int, steps: list[Step]) -> int:
    session = max(sid, INIT)
    if session in (pid, INIT):
        return session
    leader = world.get(session)
    if leader is None:
        if any(other.sid == session for other in world.every()):
            return session  # the leader is gone, its session is not, and the kernel keeps the number for it
        _make(world, steps, Ids(session, INIT, session, session, True), INIT, Command.SETSID)
    elif leader.sid != session and leader.placeholder:
        # It stood for a parent so far; its children keep the session they have.
        _make(world, steps, Ids(session, leader.ppid, session, session, True), session, Command.SETSID)
    return session


def _group(world: World, pid: int, pgid: int, session: int, steps: list[Step]) -> int:
    group = max(pgid, INIT) if session != pid else pid
    if group in (pid, session):
        return group
    leader = world.get(group)
    if leader is None:
        if any(other.pgid == group for other in world.every()):
            return group
        maker = _member(world, session)
        sibling = Command.NONE if maker == INIT or _is_placeholder(world, maker) else Command.SIBLING
        parent = maker if not sibling else _parent(world, maker)
        _make(world, steps, Ids(group, parent, group, session, True), maker, Command.SETPGID | sibling)
    elif leader.pgid != group and leader.placeholder and leader.sid == session:
        _make(world, steps, Ids(group, leader.ppid, group, session, True), group, Command.SETPGID)
    return group


def _birth(world: World, pid: int, ppid: int, session: int, group: int, steps: list[Step]) -> Birth:
    parent = max(ppid, INIT)
    leads = session == pid
    if not leads and parent != INIT and not world.get(parent):
        maker = _member(world, session)
        sibling = maker != INIT and not _is_placeholder(world, maker)
        ids = Ids(parent, _parent(world, maker) if sibling else maker, _pgid(world, maker), session, True)
        _make(world, steps, ids, maker, Command.SIBLING if sibling else Command.NONE)
    elif parent != INIT and not world.get(parent):
        _make(world, steps, Ids(parent, INIT, INIT, INIT, True), INIT, Command.NONE)
    known = world.get(parent)
    if leads:
        return Birth(parent, False, True, None)
    pgid = None if group == INIT else group
    if known and known.sid == session:
        return Birth(parent, False, False, pgid if known.pgid != group else None)
    maker = _member(world, session)
    return Birth(maker, maker != INIT, False, pgid if _pgid(world, maker) != group else None)


def _make(world: World, steps: list[Step], ids: Ids, maker: int, command: Command) -> None:
    steps.append(Step(maker, ids.pid, command))
    world.add(ids)


def _member(world: World, session: int) -> int:
    """Somebody who can give birth in a session: its leader, else a placeholder, else anybody in it."""
    leader = world.get(session)
    if leader and leader.sid == session:
        return session
    members = [ids for ids in world.every() if ids.sid == session]
    if not members:
        raise ProcessLookupError(3, f"session {session} has no member on this node")
    return max(members, key=lambda ids: ids.placeholder).pid


def _is_placeholder(world: World, pid: int) -> bool:
    ids = world.get(pid)
    return ids is not None and ids.placeholder


def _parent(world: World, pid: int) -> int:
    ids = world.get(pid)
    return ids.ppid if ids else INIT


def _pgid(world: World, pid: int) -> int:
    ids = world.get(pid)
    return ids.pgid if ids else INIT


@dataclass(frozen=True, slots=True)
class Place:
    """A `Birth` with the maker's pid as the caller sees it."""

    maker: int
    sibling: bool
    setsid: bool
    pgid: int | None


@contextmanager
def placing(
    init: int,
    pid: int,
    ppid: int,
    pgid: int,
    sid: int,
    uid: int = 0,
    on_session: Callable[[World, Birth, list[Step]], None] | None = None,
) -> Iterator[Place]:
    """Make the missing placeholders, and hold the namespace's lock while the process itself is born under them.

    Leave the context when the process exists and has called setsid or setpgid as told; until then no other worker
    makes a process here and no placeholder is dropped.

    Args:
        init: pid of nodeinit as the caller sees it.
        pid, ppid, pgid, sid: as the process has them where it comes from (cluster pids).
        uid: its real uid, which may signal the placeholders.
        on_session: called when the session has its leader, before the placeholders of the steps given to it are made.

    Raises:
        FileExistsError: the pid is in use on this node.
        TimeoutError: nodeinit does not answer.
        OSError: the namespace is gone.
    """
    namespace = nsfs.open_pid_namespace(init)
    world = None
    try:
        fcntl.flock(namespace, fcntl.LOCK_EX)
        clear_way(init, namespace, {pid, ppid, pgid, sid})
        world = World(init)
        steps, birth = plan(world, pid, ppid, pgid, sid)
        leading = [step for step in steps if step.command & Command.SETSID]
        if leading:
            carry_out(init, namespace, leading, uid)
        steps = steps[len(leading) :]
        if on_session:
            on_session(world, birth, steps)
        if steps:
            carry_out(init, namespace, steps, uid)
        maker = outer_pid(init, namespace, birth.maker)
        if maker is None:
            raise ProcessLookupError(3, f"process {birth.maker} is gone from this node")
        yield Place(maker, birth.sibling, birth.setsid, birth.pgid)
    finally:
        if world:
            world.close()
        os.close(namespace)


def find_placeholder(init: int, pid: int, others: list[int]) -> tuple[int | None, set[int]]:
    """The placeholder with this pid, as the caller sees it, or None; and which of `others` are not on this node."""
    namespace = nsfs.open_pid_namespace(init)
    try:
        fcntl.flock(namespace, fcntl.LOCK_EX)
        clear_way(init, namespace, {pid, *others})
        world = World(init)
        try:
            found = world.get(pid)
            missing = {other for other in others if world.get(other) is None}
        finally:
            world.close()
        if found is None or not found.placeholder:
            return None, missing
        return outer_pid(init, namespace, pid), missing
    finally:
        os.close(namespace)


def is_needed(init: int, pid: int, children: Sequence[int], leaving: Container[int] = ()) -> bool:
    """Whether a job that is about to leave must be stood for here: its parent may wait for it, or somebody who stays is
    its child or in its group or session.

    Args:
        pid, children: job pids.
        leaving: those of others who leave as well.
    """
    world = World(init)
    try:
        own = world.get(pid)
        if own is None:
            return False
        parent = world.get(own.ppid)
        if own.ppid != INIT and parent is not None and not parent.placeholder and own.ppid not in leaving:
            return True
        others = [ids for child in children if (ids := world.get(child))]
        if pid in (own.pgid, own.sid):
            others += [ids for ids in world.every() if ids.pid != pid and pid in (ids.pgid, ids.sid)]
        return any(not ids.placeholder and ids.pid not in leaving for ids in others)
    finally:
        world.close()


def present(init: int, pids: Sequence[int]) -> list[int]:
    """Those of these job pids that anything living has."""
    world = World(init)
    try:
        return [pid for pid in pids if world.get(pid)]
    finally:
        world.close()


def stands_for_child(init: int, pid: int) -> bool | None:
    """Whether a placeholder is the child of a job that will wait for it; None: there is no such placeholder."""
    world = World(init)
    try:
        found = world.get(pid)
        if found is None or not found.placeholder:
            return None
        parent = world.get(found.ppid)
        return found.ppid != INIT and parent is not None and not parent.placeholder
    finally:
        world.close()


def own_program(init: int) -> tuple[int, int, list[bytes], list[bytes]]:
    """What a process of the namespace runs to become a placeholder: nodeinit's own program (O_PATH) and report socket,
    which are the caller's to close; arguments, of which the second is the socket's number; environment.

    Raises:
        OSError: nodeinit has ended.
    """
    arguments = procfs.read(f"/proc/{init}/cmdline").split(b"\0")[:-1]
    handle = process_vm.pidfd_open(init)
    try:
        reports = process_vm.pidfd_getfd(handle, int(arguments[1]))
    finally:
        os.close(handle)
    try:
        program = os.open(f"/proc/{init}/exe", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        os.close(reports)
        raise
    return program, reports, arguments, [b"BPFS_COOKIE=%x" % _cookie(init), b"BPFS_PLACEHOLDER=1"]


def outer_pid(init: int, namespace: int, pid: int) -> int | None:
    """The caller's number for a job pid; None when there is no such process."""
    if pid == INIT:
        return init
    try:
        return nsfs.outer_pid(namespace, pid)
    except NotImplementedError:
        return _search(init, pid)


def _search(init: int, pid: int) -> int | None:
    # Children that are born or handed on meanwhile may be missed, the one asked for rarely.
    left = [init]
    while left:
        candidate = left.pop()
        if nsfs.pids_by_status(candidate)[-1:] == [pid]:
            return candidate
        left += procfs.children(candidate)
    return None


def command(init: int, target: int, order: Command, pid: int = 0, uid: int = 0, more: int = 0) -> None:
    """Send one command to nodeinit or a placeholder (pids as the caller sees them). Raises OSError."""
    _order(_cookie(init), target, order, pid, uid, more)


def _order(cookie: int, target: int, order: Command, pid: int, uid: int, more: int = 0) -> None:
    handle = process_vm.pidfd_open(target)
    try:
        pidfd.queue(handle, COMMAND_SIGNAL, cookie << 32 | order | pid, uid, more)
    finally:
        os.close(handle)


SENT_QUEUED = 0x100  # csrc/nodeinit.h: as sigqueue(3) does
_SENT_S = 0.5  # it takes some 50 us


def send_as(init: int, sender: int, pid: int, number: int, value: int | None) -> None:
    """Have a placeholder send a signal in the name of the process that it stands for; returns when it has.

    Args:
        sender: the placeholder, as the caller sees it.
        pid: the receiver, as its namespace does.
        value: as with sigqueue(3); None: as kill(2) does.

    Raises:
        OSError: it is gone.
    """
    handle, cookie = process_vm.pidfd_open(sender), _cookie(init) << 32
    try:
        if value is not None:
            value &= (1 << 64) - 1
            pidfd.queue(handle, COMMAND_SIGNAL, cookie | Command.SEND, value & 0xFFFFFFFF, value >> 32)
        what = number | (SENT_QUEUED if value is not None else 0)
        pidfd.queue(handle, COMMAND_SIGNAL, cookie | Command.SEND | pid, 0, what)
    finally:
        os.close(handle)
    # What comes next, a freeze maybe, shall find the signal where it belongs.
    end = time.monotonic() + _SENT_S
    while not _is_idle(sender) and time.monotonic() < end:
        time.sleep(_SENT_S / 5000)


def send_for(
    init: int, sender: int, uid: int, pid: int, number: int, value: int | None, made: Callable[[], None]
) -> bool:
    """As `send_as`, in the name of a process of which nothing is on this node: something is made that stands for it
    just for this. May wait for a birth here.

    Args:
        sender, pid: job pids.
        uid: the sender's.
        made: called when it is there, and its end is going to be reported.

    Returns:
        False where the sender has come, or no process can be made: nothing was sent.
    """
    namespace = nsfs.open_pid_namespace(init)
    try:
        fcntl.flock(namespace, fcntl.LOCK_EX)
        if outer_pid(init, namespace, sender) is not None:
            return False
        try:
            carry_out(init, namespace, [Step(INIT, sender, Command.NONE)], uid)
            outer = outer_pid(init, namespace, sender)
            if outer is None:
                return False
            made()
            send_as(init, outer, pid, number, value)
            return True
        finally:
            handle = end(init, namespace, sender)
            if handle >= 0:
                select.select([handle], [], [], _DEATH_S)
                os.close(handle)
    except OSError:
        return False
    finally:
        os.close(namespace)


def _is_idle(placeholder: int) -> bool:
    """Whether it has no command left to obey."""
    try:
        status = procfs.parse_status(procfs.read(procfs.own_file(placeholder, "status")))
        return not int(status["ShdPnd"], 16) >> (COMMAND_SIGNAL - 1) & 1 and status["State"][0] != "R"
    except (OSError, KeyError):
        return True


def dismiss(init: int, handle: int) -> None:
    """Have a placeholder (its pidfd) die by SIGKILL, but of its own hand: what it tells it has told then, and once.

    Raises:
        OSError: ESRCH.
    """
    pidfd.send(handle, signal.SIGCONT)  # it may be stopped, for its parent to see
    pidfd.queue(handle, COMMAND_SIGNAL, _cookie(init) << 32 | Command.END | signal.SIGKILL, 0)


def _cookie(init: int) -> int:
    for word in procfs.read(f"/proc/{init}/environ").split(b"\0"):
        if word.startswith(b"BPFS_COOKIE="):
            return int(word[12:], 16)
    raise ProcessLookupError(3, f"process {init} is no nodeinit")


def carry_out(init: int, namespace: int, steps: list[Step], uid: int) -> None:
    """Make placeholders, one after the other, while the namespace's lock is held. Raises OSError."""
    world, cookie = World(init), _cookie(init)  # without the plan's expectations

    def ask(step: Step) -> None:
        maker = outer_pid(init, namespace, step.maker)
        if maker is None:
            raise ProcessLookupError(3, f"process {step.maker} is gone from this node")
        _order(cookie, maker, step.command, 0 if step.pid == step.maker else step.pid, uid)

    def await_made(step: Step) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not _wait_made(world, step, _RETRY_S):
            if time.monotonic() > deadline:
                raise TimeoutError(110, f"placeholder {step.pid} did not appear on this node")
            ask(step)  # again: a placeholder that had this pid before may not have been reaped yet

    try:
        asked: list[Step] = []
        for step in steps:
            while asked and step.maker in {one.pid for one in asked}:
                await_made(asked.pop(0))
            ask(step)
            asked.append(step)
        for step in asked:
            await_made(step)
    finally:
        world.close()


def _wait_made(world: World, step: Step, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    tries = 0
    while not _is_made(world.group_and_session(step.pid), step):
        if time.monotonic() > deadline:
            return False
        tries += 1
        if tries > _YIELDS:
            time.sleep(0.0005)
        else:
            os.sched_yield()  # the maker may be waiting for this very CPU
    return True


def _is_made(seen: tuple[int, int] | None, step: Step) -> bool:
    if seen is None:
        return False
    group, session = seen
    if step.command & Command.SETSID:
        return session == step.pid
    return group == step.pid if step.command & Command.SETPGID else True


def block_of(init: int) -> range:
    """The pids that a node hands out itself. Raises OSError."""
    first, end = procfs.read(f"/proc/{init}/cmdline").split(b"\0")[2:4]
    return range(int(first), int(end))


def clear_way(init: int, namespace: int, pids: set[int]) -> None:
    """End what stands for these where it does no more than keep a pid of the node's own: it may have another parent,
    group or session than is needed now. The namespace's lock is held."""
    world = World(init)
    try:
        own = block_of(init)
        standing = {pid for pid in pids if pid in own and (ids := world.get(pid)) is not None and ids.placeholder}
    finally:
        world.close()
    if standing:
        end_all(init, namespace, [ids.pid for ids in unneeded(init) if ids.pid in standing])


def end_all(init: int, namespace: int, pids: Iterable[int]) -> list[int]:
    """End placeholders while the namespace's lock is held; gives those that were there.

    Dead before the lock is given back: a birth must not build on one that is about to die.
    """
    ended = {pid: handle for pid in pids if (handle := end(init, namespace, pid)) >= 0}
    deadline = time.monotonic() + _DEATH_S
    for handle in ended.values():
        if not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
            with suppress(ProcessLookupError):
                pidfd.send(handle, signal.SIGKILL)  # it waits to tell us something
        os.close(handle)
    return list(ended)


def unneeded(init: int) -> list[Ids]:
    """The placeholders that are no process's parent, group leader or session leader any more."""
    world = World(init)
    try:
        everybody = world.every()
    finally:
        world.close()
    needed: set[int] = set()
    jobs: set[int] = set()
    for ids in everybody:
        if not ids.placeholder:
            needed |= {ids.ppid, ids.pgid, ids.sid}
            if ids.pid != INIT:
                jobs.add(ids.pid)
    # A job's own child stands for a real one elsewhere: the job is going to wait for it.
    return [ids for ids in everybody if ids.placeholder and ids.pid not in needed and ids.ppid not in jobs]


def end(init: int, namespace: int, pid: int) -> int:
    """A pidfd of the placeholder, told to end; -1 where there is none."""
    outer = outer_pid(init, namespace, pid)
    if outer is None:
        return -1
    try:
        handle = process_vm.pidfd_open(outer)
    except ProcessLookupError:
        return -1
    try:
        dismiss(init, handle)
    except ProcessLookupError:
        os.close(handle)
        return -1
    return handle
