"""memfd_create(2): name, content and seals."""

from __future__ import annotations

import fcntl
import os
import stat

from engine.descriptors import content
from engine.descriptors.model import Entry, Kind, Probe, Refusal, Source, Target, is_mode, open_flags, reopen

_PREFIX, _SUFFIX = b"/memfd:", b" (deleted)"


def _matches(_: Source, probe: Probe) -> bool:
    return is_mode(probe, stat.S_IFREG) and probe.link.startswith(_PREFIX) and probe.status.nlink == 0


def _dump(source: Source, probe: Probe) -> Entry:
    if source.held_elsewhere(probe):
        raise Refusal(f"is a memfd that other processes have open, too ({os.fsdecode(probe.link)})")
    fd = source.grab(probe)
    if os.fstat(fd).st_blksize > 2 * os.sysconf("SC_PAGESIZE"):
        raise Refusal("is a memfd of huge pages")
    return probe.entry(
        "memfd", name=probe.link[len(_PREFIX) : -len(_SUFFIX)], seals=fcntl.fcntl(fd, fcntl.F_GET_SEALS),
        pos=probe.pos, mode=stat.S_IMODE(probe.status.mode), **content.dump(source, probe),
    )  # fmt: skip


def _build(target: Target, entry: Entry) -> int:
    key = ("content", entry["dev"], entry["ino"])
    if "runs" in entry:
        target.made[key] = target.spare(_make(entry))
    fd = reopen(target.made[key], open_flags(entry))
    os.lseek(fd, entry["pos"], os.SEEK_SET)
    return fd


def _make(entry: Entry) -> int:
    fd = os.memfd_create(os.fsdecode(entry["name"]), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    content.fill(fd, entry)
    os.fchmod(fd, entry["mode"])
    if entry["seals"]:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, entry["seals"])
    return fd


KINDS = (Kind("memfd", _matches, _dump, _build),)
