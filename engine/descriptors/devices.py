"""/dev/null and its kin, which every node has; all other devices are the machine's own and refused by name."""

from __future__ import annotations

import os
import stat

from engine.descriptors.model import Entry, Kind, Probe, Refusal, Source, Target, is_mode, open_flags, reopen
from engine.linux import statx
from engine.linux.openat2 import open_in_root

# Documentation/admin-guide/devices.txt, major 1
COMMON = {
    os.makedev(1, 3): b"/dev/null",
    os.makedev(1, 5): b"/dev/zero",
    os.makedev(1, 7): b"/dev/full",
    os.makedev(1, 8): b"/dev/random",
    os.makedev(1, 9): b"/dev/urandom",
}


def _is_common(_: Source, probe: Probe) -> bool:
    return is_mode(probe, stat.S_IFCHR) and probe.status.rdev in COMMON


def _dump(_: Source, probe: Probe) -> Entry:
    return probe.entry("device", rdev=probe.status.rdev)


def _build(target: Target, entry: Entry) -> int:
    path = COMMON[entry["rdev"]]
    # The jobs' own /dev first, so that the path reads right; it may lack the file.
    try:
        found = open_in_root(target.root, path, os.O_PATH)
    except OSError:
        return os.open(path, open_flags(entry) | os.O_CLOEXEC)
    try:
        right = statx.of_descriptor(found).rdev == entry["rdev"]
        return reopen(found, open_flags(entry)) if right else os.open(path, open_flags(entry) | os.O_CLOEXEC)
    finally:
        os.close(found)


def _is_device(_: Source, probe: Probe) -> bool:
    return stat.S_IFMT(probe.status.mode) in (stat.S_IFCHR, stat.S_IFBLK)


def _refuse(_: Source, probe: Probe) -> Entry:
    path = os.fsdecode(probe.link)
    if probe.status.rdev == os.makedev(5, 2):
        raise Refusal(f"is the master side of a terminal ({path})")
    kind = "block device" if is_mode(probe, stat.S_IFBLK) else "device"
    raise Refusal(f"is the {kind} {path}")


def _never(_: Target, entry: Entry) -> int:
    raise ValueError(f"a descriptor of kind {entry['kind']} is never built")


KINDS = (
    Kind("device", _is_common, _dump, _build),
    Kind("other device", _is_device, _refuse, _never),
)
