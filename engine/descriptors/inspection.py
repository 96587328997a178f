"""Reads all descriptors of a stopped process into a table."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from engine.descriptors import epoll, external, kin, locks, owner
from engine.descriptors.kin import Kin
from engine.descriptors.model import CONTENT_LIMIT, Entry, Kind, Probe, Refusal, Source, is_mode
from engine.descriptors.table import KINDS
from engine.linux import statx
from engine.linux.kcmp import same_file

_CLOEXEC = 0o2000000
_INFO_BYTES = 1 << 16


@dataclass(slots=True)
class Descriptors:
    """What `inspect` found.

    Attributes:
        table: one entry an open file description, see `engine.descriptors.model`; goes into the image.
        externals: what must be relayed, see `engine.descriptors.external`.
        refusals: sentences about what cannot move; when there are any, the table is not complete.
        closed: numbers that are left out because what they stand for cannot move and the caller lets it go.
    """

    table: list[Entry] = field(default_factory=list)
    externals: list[dict[str, Any]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)


def inspect(
    pid: int,
    *,
    tid: int = 0,
    content_limit: int = CONTENT_LIMIT,
    close: bool = False,
    files_stay: bool = False,
    at_home: bool = False,
    shared: Kin | None = None,
) -> Descriptors:
    """Read the descriptors of a process that is stopped (so that they hold still). It is not changed.

    Args:
        pid: host pid.
        tid: a living thread of it when the leader has exited.
        content_limit: bytes of deleted files, memfds and pipes that may travel.
        close: sockets and other objects that cannot move are left out, not refused. Files are refused all the same:
            their content would be lost.
        files_stay: standard descriptors that are files are relayed: the destination does not have users' files.
        at_home: it leaves the master: what it writes to a file together with relatives is relayed, too.
        shared: what it has in common with others that move with it.

    Raises:
        OSError: the process is gone, or may not be looked at.
    """
    found, shared = Descriptors(), shared or Kin()
    with Source(pid, content_limit, files_stay, at_home, shared.pids) as source:
        source.probes = probes_of(pid, tid)
        for probe in source.probes:
            try:
                if (key := shared.fds.get(probe.fd)) is not None:
                    found.table.append(kin.entry_of(source, probe, key))
                else:
                    _dump(source, probe, found, probe.fd in shared.relayed)
            except Refusal as refusal:
                if close and (is_mode(probe, stat.S_IFSOCK) or kind_of(source, probe).name == "other"):
                    found.closed += [fd for fd, _ in probe.fds]
                else:
                    found.refusals.append(f"fd {probe.fd} {refusal}")
    if found.closed:
        epoll.forget(found.table, found.closed)
    return found


def probes_of(pid: int, tid: int = 0) -> list[Probe]:
    """The open file descriptions of a process that stands still. Raises OSError.

    Args:
        tid: a living thread of it.
    """
    return _merge(pid, _probe_all(b"/proc/%d/task/%d" % (pid, tid or pid)))


def look(pid: int, files_stay: bool = False, at_home: bool = False) -> list[dict[str, Any]]:
    """The externals of a process that runs: what `inspect` will most likely find of them once it stands still.

    Raises:
        OSError: the process is gone, or may not be looked at.
    """
    found = []
    with Source(pid, files_stay=files_stay, at_home=at_home) as source:
        probes = []
        for fd in _numbers(b"/proc/%d" % pid):
            with suppress(OSError):  # closed meanwhile
                probes.append(_probe(b"/proc/%d" % pid, fd))
        source.probes = _merge(pid, probes)
        for probe in source.probes:
            kind = kind_of(source, probe)
            if kind.name == "external":
                with suppress(OSError, Refusal):
                    found.append(external.describe_external(source, probe, kind.dump(source, probe)))
    return found


def _numbers(process: bytes) -> list[int]:
    return sorted(map(int, os.listdir(process + b"/fd")))


def _probe(process: bytes, fd: int) -> Probe:
    path = b"%b/fd/%d" % (process, fd)
    info = _read(b"%b/fdinfo/%d" % (process, fd))
    # "pos:\t0\nflags:\t0100002\n…"
    pos, flags = info.split(b"\n", 2)[:2]
    bits = int(flags[6:], 8)
    cloexec = bool(bits & _CLOEXEC)
    return Probe([(fd, cloexec)], os.readlink(path), bits & ~_CLOEXEC, int(pos[4:]), info, statx.of_path(path))


def _probe_all(process: bytes) -> list[Probe]:
    return [_probe(process, fd) for fd in _numbers(process)]


def _read(path: bytes) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = part = os.read(fd, _INFO_BYTES)
        # A big epoll set has more lines than one read of /proc gives.
        while part and len(data) > 1024:
            part = os.read(fd, _INFO_BYTES)
            data += part
        return data
    finally:
        os.close(fd)


def _merge(pid: int, probes: list[Probe]) -> list[Probe]:
    """Numbers that share one open file description become one probe. Only equals can be the same."""
    groups: dict[tuple[object, ...], list[Probe]] = {}
    merged = []
    for probe in probes:
        group = groups.setdefault((probe.link, probe.flags, probe.pos), [])
        for other in group:
            if same_file(pid, other.fd, probe.fd):
                other.fds += probe.fds
                break
        else:
            group.append(probe)
            merged.append(probe)
    return merged


def kind_of(source: Source, probe: Probe) -> Kind:
    """What looks after a description."""
    return next(kind for kind in KINDS if kind.matches(source, probe))


def _dump(source: Source, probe: Probe, found: Descriptors, relayed: bool) -> None:
    entry = external.dump(source, probe) if relayed else kind_of(source, probe).dump(source, probe)
    if b"\nlock:" in probe.info and (held := locks.dump(probe)):
        entry["locks"] = held
    entry |= owner.dump(source, probe)
    if entry["kind"] == "external":
        found.externals.append(external.describe_external(source, probe, entry))
    found.table.append(entry)
