# SPDX-License-Identifier: GPL-2.0-or-later
"""The names of nodes as a file in the format of hosts(5), for libnss_beo(8).

It lies beside the run directory, which only root may enter, on the master and on each node with a /run of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

LOOPBACK = "127.0.0.1"


def text(addresses: Mapping[int, str], master: str, own: int | None = None) -> str:
    """The file's text.

    Args:
        addresses: of nodes, by number.
        master: the master's address as it is reached from here; one that stands for all is replaced by loopback's.
        own: the node this is, whose line gets the name `self`; None where several nodes, or the master, read the file.
    """
    if not master or ip_address(master).is_unspecified:
        master = LOOPBACK
    lines = [f"{master} master .-1"]
    for number, address in sorted(addresses.items()):
        lines.append(f"{address} n{number} .{number}" + (" self" if number == own else ""))
    return "".join(f"{line}\n" for line in lines)


def write(path: Path, content: str) -> None:
    """Replace the file at once, for everybody to read. Raises OSError."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644), "w") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(content)
    temporary.rename(path)
