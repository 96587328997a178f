# SPDX-License-Identifier: GPL-2.0-or-later
"""procs/PID/mapped: whose the files are that a process maps, where it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping

from engine import digests, lending
from engine.linux import mounts, procfs


def render(files: Mapping[str, bytes]) -> str:
    """The lines, in the order of addresses, each file once.

    Args:
        files: `maps` and `mountinfo` of the process.
    """
    types = mounts.types(files["mountinfo"])
    lines: dict[str, None] = {}
    for vma in procfs.parse_maps(files["maps"]):
        name = lending.borrowed_name(vma.path)
        if name:
            lines[f"carried {name}\n"] = None
        elif vma.path.startswith("/") and not vma.path.startswith(procfs.NO_FILES):
            device = os.makedev(vma.major, vma.minor)
            lines[f"{_whose(types.get(device, ''))} {vma.path}\n"] = None
    return "".join(lines)


def _whose(file_system: str) -> str:
    if file_system == digests.VIEW:
        return "cache"
    return "network" if file_system in mounts.OF_SERVERS else "own"
