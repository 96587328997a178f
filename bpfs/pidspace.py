"""Keeps the master's own pids below those that the nodes hand out, so that a pid means one process in the cluster.

kernel.pid_max is a setting of the machine: it is lowered by the first master that runs here and put back by the last.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bpfs import kernel, log
from bpfs.rundir import BASE

BLOCK_SIZE = 2048
"""Pids that a node hands out itself."""
BLOCK_BASE = 2 << 20
"""First pid of node 0's block: the upper half of the kernel's pid space (PID_MAX_LIMIT is 4 << 20) holds 1,024
blocks."""

PID_MAX = Path("/proc/sys/kernel/pid_max")
RECORD = BASE / "pid_max"
"""What it was before; every running master holds a shared lock on it."""

_log = log.get("master")


def pid_block(number: int) -> range:
    """The pids that a node hands out itself."""
    first = BLOCK_BASE + number % 1024 * BLOCK_SIZE
    return range(first, first + BLOCK_SIZE)


@contextmanager
def own_pids() -> Iterator[None]:
    """Native pids stay below the nodes' blocks as long as the context lasts."""
    with _alone():
        record = os.open(RECORD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(record, fcntl.LOCK_SH)
        _lower(record)
    try:
        yield
    finally:
        with _alone():
            _leave(record)
            os.close(record)


def restore() -> None:
    """Put it back when no master runs any more (the last was killed)."""
    with suppress(FileNotFoundError), _alone():
        record = os.open(RECORD, os.O_RDWR | os.O_CLOEXEC)
        try:
            _leave(record)
        finally:
            os.close(record)


@contextmanager
def _alone() -> Iterator[None]:
    """Nobody else looks at the setting meanwhile."""
    while not _is(folder := _locked(), BASE):
        os.close(folder)  # the last to leave has taken the folder away
    try:
        yield
    finally:
        os.close(folder)


def _locked() -> int:
    BASE.mkdir(mode=0o755, parents=True, exist_ok=True)
    folder = os.open(BASE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(folder, fcntl.LOCK_EX)
    return folder


def _is(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _lower(record: int) -> None:
    before = int(PID_MAX.read_text())
    if before <= BLOCK_BASE:
        return
    try:
        PID_MAX.write_text(f"{BLOCK_BASE}\n")
    except OSError as error:
        _log.warning("pids of this machine may clash with those of nodes: kernel.pid_max: %s", error.strerror)
        return
    if _new_namespace_limit() <= BLOCK_BASE:
        # Before Linux 6.14 it is one for all namespaces: virtual nodes could not have pids of their blocks.
        PID_MAX.write_text(f"{before}\n")
        _log.warning("pids of this machine may clash with nodes': this kernel has one pid_max for all namespaces")
        return
    os.pwrite(record, b"%d\n" % before, 0)
    _log.info("kernel.pid_max is %d while a master runs, was %d", BLOCK_BASE, before)
    above = [name for name in os.listdir("/proc") if name.isdigit() and int(name) >= BLOCK_BASE]
    if above:
        _log.warning("%d processes have pids that nodes may hand out, such as %s", len(above), above[0])


def _new_namespace_limit() -> int:
    """kernel.pid_max as a new pid namespace has it."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            kernel.unshare(kernel.CLONE_NEWPID)
            inner = os.fork()
            if inner == 0:
                os.write(theirs, PID_MAX.read_bytes())
                os._exit(0)
            os.waitpid(inner, 0)
        finally:
            os._exit(0)
    os.close(theirs)
    try:
        os.waitpid(child, 0)
        return int(os.read(ours, 64) or b"0")
    finally:
        os.close(ours)


def _leave(record: int) -> None:
    try:
        fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # another master runs
    before = os.pread(record, 64, 0).strip()
    # Where somebody has set it to something else meanwhile, it is his.
    if before and PID_MAX.read_text().strip() == str(BLOCK_BASE):
        with suppress(OSError):
            PID_MAX.write_bytes(before + b"\n")
    RECORD.unlink(missing_ok=True)
    with suppress(OSError):  # other clusters are there
        BASE.rmdir()
