"""The configuration file: /etc/beowulf/config, in the ClusterWare manner.

A keyword a line with its arguments, ``#`` starts a comment, words may be quoted as in a shell. The keywords are one table,
`KEYWORDS`; an unknown one is an error that names file, line and the nearest known keyword. The virtual cluster needs no file.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bpfs.errors import ConfigError

DEFAULT_PATH = Path("/etc/beowulf/config")
DEFAULT_KEY = Path("/etc/beowulf/key")
DEFAULT_PORT = 932
"""`bprocport` of Scyld's configuration: the port its bpmaster listened on."""
DEFAULT_LEASE = 30.0
"""Seconds that a slave lives on without hearing from the master."""
DEFAULT_NODES = 1024


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """One `node` line: a number and the hardware addresses that get it."""

    number: int
    macs: tuple[str, ...]


@dataclass(slots=True)
class Config:
    """What the file says, or the defaults."""

    interface: str = ""  # listen on this interface's address; empty: the host's own choice (all)
    address: str = ""  # listen on this address; comes before `interface`
    port: int = DEFAULT_PORT
    nodes: int = DEFAULT_NODES  # node numbers go from 0 to this - 1
    ranges: list[tuple[str, str]] = field(default_factory=list)  # first and last address for nodes
    entries: list[NodeEntry] = field(default_factory=list)
    lease: float = DEFAULT_LEASE  # seconds
    pingtimeout: float | None = None  # seconds of silence after which a node is down; None: lease + margin
    key: Path = DEFAULT_KEY
    mount: str = "/bpfs"

    @property
    def margin(self) -> float:
        """Seconds that the master waits beyond the lease: a tenth of it (clock rates, scheduling), at least one."""
        return max(1.0, self.lease / 10)

    @property
    def silence(self) -> float:
        """Seconds of silence after which the master takes a node for dead, its lease surely over."""
        return self.pingtimeout if self.pingtimeout is not None else self.lease + self.margin

    @property
    def heartbeat(self) -> float:
        """Seconds between a slave's heartbeats: two may be lost before the lease is in danger."""
        return min(self.lease / 4, 10.0)

    def number_for(self, macs: tuple[str, ...]) -> int | None:
        """The number that the configuration gives to these hardware addresses, or None."""
        for entry in self.entries:
            if any(mac in entry.macs for mac in macs):
                return entry.number
        return None
