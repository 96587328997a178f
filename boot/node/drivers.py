"""Loading of the drivers of this machine's hardware: what the buses name, until nothing new appears.

The image has two tables for that, made by boot.image: `needs` (a module, its file, the modules that it needs) and
`aliases` (a pattern of devices, a module).
"""

from __future__ import annotations

import ctypes
import os
from fnmatch import fnmatchcase
from pathlib import Path

from boot.node.console import say

FOLDER = Path("/lib/modules")
NEEDS, ALIASES, ALWAYS = FOLDER / "needs", FOLDER / "aliases", FOLDER / "always"

_FINIT_MODULE = 313  # arch/x86/entry/syscalls/syscall_64.tbl
_EEXIST = 17


class Drivers:
    """The modules of the image, and which of them have been tried."""

    def __init__(self) -> None:
        lines = [line.split() for line in NEEDS.read_text().splitlines()]
        self._files = {name: path for name, path, *_ in lines}
        self._needs = {name: needs for name, _, *needs in lines}
        self._aliases = [tuple(line.split()) for line in ALIASES.read_text().splitlines()]
        self._tried: set[str] = set()
        self._seen: set[str] = set()

    def load(self, name: str) -> None:
        """Load a module and what it needs; a failure is told and does not end anything."""
        if name in self._tried or name not in self._files:
            return
        self._tried.add(name)
        for need in self._needs[name]:
            self.load(need)
        errno = _finit_module(FOLDER / self._files[name])
        if errno not in (0, _EEXIST):
            say(f"driver {name}: {os.strerror(errno)}")

    def load_always(self) -> None:
        """Load what the node's programs want, whatever the hardware."""
        for name in ALWAYS.read_text().split():
            self.load(name)

    def load_for_hardware(self) -> list[str]:
        """Load the drivers of every device there is, and of those that appear by it; gives the names of new ones."""
        before = set(self._tried)
        while new := _devices() - self._seen:
            self._seen |= new
            for device in sorted(new):
                for pattern, name in self._aliases:
                    if fnmatchcase(device, pattern):
                        self.load(name)
        return sorted(self._tried - before)


def _devices() -> set[str]:
    found = set()
    for path in Path("/sys/bus").glob("*/devices/*/modalias"):
        try:
            found.add(path.read_text().strip())
        except OSError:
            continue  # it went away just now
    return found - {""}


def _finit_module(path: Path) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return error.errno or 1
    try:
        return ctypes.get_errno() if libc.syscall(_FINIT_MODULE, fd, b"", 0) else 0
    finally:
        os.close(fd)
