"""Makes the descriptors of a table in this process; whoever restores moves them into the new one (SCM_RIGHTS, dup3)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.descriptors import locks, owner
from engine.descriptors.ghost import Ghost
from engine.descriptors.model import SETTABLE, Entry, Row, Target
from engine.descriptors.table import BY_NAME
from engine.linux.credentials import Credentials


@dataclass(frozen=True, slots=True)
class Placed:
    """`local_fd` of this process is to become `target_fd` of the new one. Duplicates share their `local_fd`."""

    target_fd: int
    local_fd: int
    cloexec: bool


def rebuild(
    table: Iterable[Entry],
    externals: Mapping[int, int],
    root: int,
    credentials: Credentials,
    pid: int,
    ghost: Mapping[int, int] | None = None,
) -> list[Placed]:
    """Make every descriptor of a table in this process.

    Args:
        table: of `inspect`.
        externals: key -> descriptor of this process to place for it. They stay the caller's to close.
        root: host pid of a process whose root directory the paths mean: nodeinit, or the ghost at home.
        credentials: the process's rights to files.
        pid: host pid of the process that is built.
        ghost: at home: `pid` is the ghost, and its own open descriptions are taken over where they are on the same
            object; maps the key of an external to the ghost's descriptor for it, where that is not the same number.

    Returns:
        One element a descriptor number. Close them by `close_all` when they are in place.

    Raises:
        OSError: names what could not be made; nothing stays open.
    """
    place = os.open(f"/proc/{root}/root", os.O_PATH | os.O_CLOEXEC)
    placed: list[Placed] = []
    try:
        with Target(place, credentials, dict(externals), pid) as target, Ghost(pid, ghost) as old:
            for entry in table:
                fd = _make(target, old, entry)
                placed += [Placed(number, fd, cloexec) for number, cloexec in entry["fds"]]
            target.finish()
    except BaseException:
        close_all(placed)
        raise
    return placed


def _make(target: Target, ghost: Ghost, entry: Entry) -> int:
    number = entry["fds"][0][0]
    try:
        fd = ghost.adopt(entry) if entry.get("key") not in target.externals or entry["kind"] != "external" else None
        if fd is None:
            fd = BY_NAME[entry["kind"]].build(target, entry)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        raise OSError(error.errno, f"fd {number} ({name}{error.strerror or error})") from error
    _set_flags(fd, entry["flags"])
    return fd


def _set_flags(fd: int, flags: int) -> None:
    if not flags & os.O_PATH and fcntl.fcntl(fd, fcntl.F_GETFL) & SETTABLE != flags & SETTABLE:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & SETTABLE)


def close_all(placed: Iterable[Placed]) -> None:
    """Close this process's side of the descriptors."""
    for fd in {one.local_fd for one in placed}:
        os.close(fd)


def after_placed(table: Iterable[Entry], pid: int, pgid: int) -> list[Row]:
    """The calls to make inside the process when every descriptor is in place.

    Args:
        pid, pgid: as the process sees them itself.
    """
    rows: list[Row] = []
    for entry in table:
        rows += BY_NAME[entry["kind"]].rows(entry)
        rows += owner.rows(entry, pid, pgid)
    return rows


def at_resume(table: Iterable[Entry]) -> list[Row]:
    """The calls to make inside the process when its source is gone, before it runs: locks. Failing is no error."""
    return [row for entry in table for row in locks.rows(entry)]
