"""Loading of the drivers of this machine's hardware: what the buses name, until nothing new appears."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from boot import modules
from boot.modules import Table
from boot.node.console import say

FOLDER = Path("/lib/modules")
FETCHED = Path("/", modules.FETCHED)
"""Is there in phase 2."""

_FINIT_MODULE = 313  # arch/x86/entry/syscalls/syscall_64.tbl
_EEXIST = 17


class Drivers:
    """The modules of the image, and which of them have been tried."""

    def __init__(self) -> None:
        tables = (path for path in (Path("/", modules.IMAGE), FETCHED) if path.exists())
        self._table = Table.parse("".join(path.read_text() for path in tables))
        self._tried: set[str] = set()
        self._seen: set[str] = set()

    def load(self, name: str) -> None:
        """Load a module and what it needs; a failure is told and does not end anything."""
        if name in self._tried or name not in self._table.files:
            return
        self._tried.add(name)
        for need in self._table.needs[name]:
            self.load(need)
        errno = _finit_module(FOLDER / self._table.files[name])
        if errno not in (0, _EEXIST):
            say(f"driver {name}: {os.strerror(errno)}")

    def load_always(self) -> None:
        """Load what the node's programs want, whatever the hardware."""
        for name in self._table.always:
            self.load(name)

    def load_for_hardware(self) -> list[str]:
        """Load the drivers of every device there is, and of those that appear by it; gives the names of new ones."""
        before = set(self._tried)
        while new := devices() - self._seen:
            self._seen |= new
            for name in self._table.drivers(new):
                self.load(name)
        return sorted(self._tried - before)


def devices() -> set[str]:
    """What the buses name, as patterns of drivers have it."""
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
