"""What a process shares with others of a tree that moves as a whole: it is made once, and handed to all.

See engine/kin.py. The table of a process has an entry of kind `kin` in its place, whose `key` names the descriptor that
is handed to it, as with an external.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.descriptors import external, locks, owner
from engine.descriptors.model import Entry, Kind, Probe, Source, boot_id, is_mode

FIRST_KEY = 1 << 20  # above all descriptor numbers, by which externals are named
SHM = "/dev/shm/"  # shm_open(3), sem_open(3): memory with a name, which another machine does not know

Object = tuple[int, int]
"""Device and inode."""


@dataclass(frozen=True, slots=True)
class Kin:
    """One process's part of what its tree shares.

    Attributes:
        pids: host pids of the tree.
        fds: its descriptor number -> key.
        memory: object that it may map -> key.
        relayed: those of its descriptor numbers that are relayed.
    """

    pids: frozenset[int] = frozenset()
    fds: Mapping[int, int] = field(default_factory=dict)
    memory: Mapping[Object, int] = field(default_factory=dict)
    relayed: frozenset[int] = frozenset()

    @classmethod
    def told(cls, plain: Mapping[str, Any] | None) -> Kin:
        """From a request: `pids`; `fds`, `memory`, `relayed` as [number, key], [device, inode, key], [number, of]."""
        if not plain:
            return cls()
        memory = {(device, inode): key for device, inode, key in plain["memory"]}
        relayed = frozenset(number for number, *_ in plain["relayed"])
        return cls(frozenset(plain["pids"]), dict(plain["fds"]), memory, relayed)


def is_without_place(probe: Probe) -> bool:
    """Whether a regular file is nowhere to be found on another machine: it is memory, or has no name."""
    return probe.status.nlink == 0 or probe.link.startswith((SHM.encode(), b"/memfd:"))


def entry_of(source: Source, probe: Probe, key: int) -> Entry:
    """The entry in a process's own table for what it shares. Raises Refusal."""
    of = "file" if is_mode(probe, stat.S_IFREG) and not is_without_place(probe) else ""
    entry = probe.entry("kin", key=key, of=of, pos=probe.pos, boot=boot_id())
    if b"\nlock:" in probe.info and (held := locks.dump(probe)):
        entry["locks"] = held
    return entry | owner.dump(source, probe)


KINDS = (Kind("kin", lambda _, __: False, lambda _, probe: probe.entry("kin"), external.build),)
