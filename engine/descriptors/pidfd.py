"""pidfd_open(2) on the process itself; any other would have to follow a process that does not come along."""

from __future__ import annotations

from engine.descriptors.model import Entry, Kind, Probe, Refusal, Source, Target
from engine.linux import process_vm


def _matches(_: Source, probe: Probe) -> bool:
    return probe.link.startswith((b"anon_inode:[pidfd]", b"pidfd:"))


def _dump(source: Source, probe: Probe) -> Entry:
    pid = int(probe.field(b"Pid") or -1)
    if pid != source.pid:
        raise Refusal(f"is a pidfd of {f'process {pid}' if pid > 0 else 'a process that has ended'}")
    return probe.entry("pidfd")


def _build(target: Target, _: Entry) -> int:
    return process_vm.pidfd_open(target.pid)


KINDS = (Kind("pidfd", _matches, _dump, _build),)
