"""What a slave is told at its start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_CACHE = Path("/var/cache/bpfs")


@dataclass(frozen=True, slots=True)
class SlaveOptions:
    """The options of one slave.

    Attributes:
        host, port: the master's.
        key: the cluster key.
        number: the node number to ask for; None: the master decides.
        mount: where to mount the tree here; None: nowhere.
        verbose: log more.
        onlost, onlost_after: what a real node does when it has not found a master for so many seconds: `wait`, `reboot`
            (which `continue` comes to then) or `halt`. The supervisor enters what the last master said.
        watch: the socket of this machine's jobwatch; None: the node has one of its own.
        empty: jobs have a root of their own with nothing but the view of the master's files.
        cache: where the view keeps contents of files.
    """

    host: str
    port: int
    key: bytes
    number: int | None = None
    mount: str | None = None
    verbose: bool = False
    watch: Path | None = None
    empty: bool = False
    cache: Path = DEFAULT_CACHE
    onlost: str = "wait"
    onlost_after: float = 0.0
