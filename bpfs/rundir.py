"""The directory of a running cluster, /run/bpfs/MOUNT: key, port, pids, logs, the master's control socket.

It is named after the mount point (as systemd-escape --path would), so that several clusters live side by side and
every command finds the one that is meant.
"""

from __future__ import annotations

import os
import shutil
import socket
import string
from dataclasses import dataclass
from pathlib import Path

from bpfs.errors import ConfigError

BASE = Path("/run/bpfs")
DEFAULT_MOUNT = "/bpfs"

_PLAIN = set(string.ascii_letters + string.digits + ":_.")


def escape(mount: str) -> str:
    """The name of a mount point as one word: ``/srv/a-b`` is ``srv-a\\x2db``."""
    parts = [part for part in mount.split("/") if part]
    words: list[str] = []
    for part in parts:
        text = "".join(c if c in _PLAIN else "".join(f"\\x{byte:02x}" for byte in os.fsencode(c)) for c in part)
        words.append("\\x2e" + text[1:] if text.startswith(".") and not words else text)
    return "-".join(words) or "-"


def chosen_mount(option: str | None) -> str:
    """The mount point that a command means: its --mount, else $BPFS, else /bpfs; made absolute and plain.

    Raises:
        ConfigError: it cannot be one.
    """
    mount = option or os.environ.get("BPFS") or DEFAULT_MOUNT
    plain = os.path.normpath(os.path.abspath(mount))
    if plain == "/" or "\n" in plain:
        raise ConfigError(f"{mount!r} cannot be a mount point for a cluster")
    return plain


@dataclass(frozen=True, slots=True)
class Recorded:
    """A process that a pid file names, with its start time so that a reused pid is not taken for it."""

    pid: int
    started: int  # clock ticks after boot, field 22 of /proc/PID/stat; 0: not known

    @property
    def alive(self) -> bool:
        """Whether it still runs (a zombie does not)."""
        state, started = process_start(self.pid)
        return state not in "ZX" and self.started == started


def process_start(pid: int) -> tuple[str, int]:
    """State letter and start time of a process; ``("X", 0)`` where there is none."""
    try:
        # Not /proc/PID/stat: that of a ghost may be covered by what its process does elsewhere.
        fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "X", 0
    return fields[0], int(fields[19])


@dataclass(frozen=True, slots=True)
class RunDir:
    """The run directory of one cluster."""

    mount: str

    @property
    def path(self) -> Path:
        """The directory itself."""
        return BASE / escape(self.mount)

    @property
    def key(self) -> Path:
        """The cluster key, mode 0600."""
        return self.path / "key"

    @property
    def virtual(self) -> bool:
        """Whether it is that of a virtual cluster, which is known by its key."""
        return self.key.exists()

    @property
    def control(self) -> Path:
        """The master's control socket."""
        return self.path / "control"

    @property
    def hosts(self) -> Path:
        """The names of nodes, for everybody to read (bpfs.hosts); the directory itself is root's only."""
        return BASE / f"{escape(self.mount)}.hosts"

    @property
    def watch(self) -> Path:
        """The socket of the virtual nodes' jobwatch."""
        return self.path / "watch"

    @property
    def master_log(self) -> Path:
        """What bpmaster logs."""
        return self.path / "master.log"

    @property
    def programs(self) -> Path:
        """The mount point of the ghost programs with file capabilities (bpfs.procs.programs)."""
        return self.path / "ghosts"

    @property
    def psview(self) -> Path:
        """The mount point of what covers the /proc files of ghosts (bpfs.procs.covers)."""
        return self.path / "psview"

    def node_log(self, number: int) -> Path:
        """What the slave of a virtual node logs."""
        return self.path / f"n{number}.log"

    def node_cache(self, number: int) -> Path:
        """Where a virtual node with an empty root keeps what it has of the master's files."""
        return self.path / f"n{number}.cache"

    def make(self) -> None:
        """Make the directory, for root only; it may exist."""
        BASE.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)

    def write(self, name: str, text: str) -> None:
        """Write a small file at once, for root only."""
        temporary = self.path / f".{name}.{os.getpid()}"
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(text)
        temporary.rename(self.path / name)

    def read(self, name: str) -> str | None:
        """A small file's text, or None."""
        try:
            return (self.path / name).read_text()
        except OSError:
            return None

    def record(self, role: str, pid: int) -> None:
        """Enter a process as `role`.pid."""
        self.write(f"{role}.pid", f"{pid} {process_start(pid)[1]}\n")

    def forget(self, role: str) -> None:
        """Remove a pid file."""
        (self.path / f"{role}.pid").unlink(missing_ok=True)

    def recorded(self) -> dict[str, Recorded]:
        """All recorded processes by role (``master``, ``n3``, …), dead ones included."""
        found: dict[str, Recorded] = {}
        for path in sorted(self.path.glob("*.pid")):
            words = (self.read(path.name) or "").split()
            if len(words) == 2 and all(word.isdigit() for word in words):
                found[path.stem] = Recorded(int(words[0]), int(words[1]))
        return found

    def master_pid(self) -> int:
        """The pid of the master that runs here, 0 where none does."""
        master = self.recorded().get("master")
        return master.pid if master is not None and master.alive else 0

    def ask(self, line: str, timeout: float = 5.0) -> str:
        """Ask the master by its control socket (bpfs.master.control).

        Raises:
            OSError: nobody serves it, or not in time.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(timeout)
            # The path may be longer than the 107 bytes of an address: go by the directory's descriptor.
            folder = os.open(self.path, os.O_PATH | os.O_CLOEXEC)
            try:
                sock.connect(f"/proc/self/fd/{folder}/{self.control.name}")
            finally:
                os.close(folder)
            sock.sendall(line.encode() + b"\n")
            parts = []
            while data := sock.recv(65536):
                parts.append(data)
        return b"".join(parts).decode()

    def leave(self) -> None:
        """A master that was started by hand has ended: nothing of it is needed any more.

        That of a virtual cluster is left to `bpcluster down`.
        """
        if not self.virtual:
            self.remove()

    def remove(self) -> None:
        """Remove the directory, and its parent when it was the last."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.hosts.unlink(missing_ok=True)
        try:
            BASE.rmdir()
        except OSError:
            pass  # other clusters are there
