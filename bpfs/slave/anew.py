"""A supervisor that goes on as another program, a newer one maybe, with all that it keeps.

`python -m bpfs.slave.anew FD`: it stays the same process, and so the parent of what has to live on. What it knows is in
a file without a name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, NoReturn

import msgpack

from bpfs import log
from bpfs.slave.keeper import Kept, Key
from bpfs.slave.options import SlaveOptions

CHECK: Final = "check"
_PATHS: Final = frozenset({"watch", "cache"})


@dataclass(slots=True)
class Heritage:
    """What a supervisor leaves to itself; see `Supervisor`."""

    options: SlaveOptions
    identity: bytes
    number: int | None
    fence: float
    lease_end: float
    lives: int
    kept: dict[Key, Kept]

    def pack(self) -> bytes:
        """As a file has it."""
        options = asdict(self.options)
        options |= {name: str(options[name]) for name in _PATHS if options[name] is not None}
        kept = [[key, one.value, one.fds] for key, one in self.kept.items()]
        rest = [getattr(self, field.name) for field in fields(self)[1:-1]]
        return bytes(msgpack.packb([options, *rest, kept]))

    @classmethod
    def unpack(cls, data: bytes) -> Heritage:
        """The inverse of `pack`. What a program of another day has left out is as by default."""
        words: dict[str, Any]
        words, identity, number, fence, lease_end, lives, kept = msgpack.unpackb(data)
        known = {field.name for field in fields(SlaveOptions)}
        words |= {name: Path(words[name]) for name in _PATHS if words.get(name) is not None}
        options = SlaveOptions(**{name: value for name, value in words.items() if name in known})
        table = {(key[0], key[1]): Kept(value, fds) for key, value, fds in kept}
        return cls(options, identity, number, fence, lease_end, lives, table)


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bpfs.slave.anew", *arguments]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


def check() -> int:
    """Try whether the program would start; gives the pid, whose exit code tells. Raises OSError."""
    process = subprocess.Popen(_command(CHECK), env=_environment(), cwd="/", stdin=subprocess.DEVNULL)
    process.returncode = 0  # the caller reaps all his children himself
    return process.pid


def go_on(heritage: Heritage) -> NoReturn:
    """Become that program. Raises OSError."""
    file = os.memfd_create("bpslave-heritage", 0)
    os.write(file, heritage.pack())
    for one in heritage.kept.values():
        for fd in one.fds:
            os.set_inheritable(fd, True)
    command = _command(str(file))
    os.execve(command[0], command, _environment())


def main() -> int:
    """Entry point; gives the exit code."""
    from bpfs.slave.life import live
    from bpfs.slave.supervisor import Supervisor

    if sys.argv[1] == CHECK:
        return 0
    file = int(sys.argv[1])
    with open(file, "rb") as packed:
        packed.seek(0)
        heritage = Heritage.unpack(packed.read())
    for one in heritage.kept.values():
        for fd in one.fds:
            os.set_inheritable(fd, False)
    log.start(f"n{heritage.number}", None, heritage.options.verbose)
    return Supervisor.inherit(heritage, live).run()


if __name__ == "__main__":
    sys.exit(main())
