"""Finds what a test session left behind on the machine.

Everything a session starts is a descendant of pytest or carries the session's own temporary folder in its environment
(TMPDIR), its command line or its mount point, so other clusters and other test runs on the same machine are never
mistaken for ours.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from bpfs.rundir import BASE, escape

# Daemons that were told to end may take a moment on a busy machine.
GRACE_SECONDS = 60.0

MNT_DETACH = 2  # <sys/mount.h>


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""  # ended meanwhile, or a kernel thread


def _state_and_parent(pid: int) -> tuple[str, int]:
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return (fields[0].decode(), int(fields[1])) if len(fields) > 1 else ("X", 0)


def alive(pid: int) -> bool:
    """Whether the process is there and has not ended (a zombie has)."""
    return _state_and_parent(pid)[0] not in "ZX"


def _ancestry(pid: int) -> list[int]:
    """The process and its ancestors up to pid 1."""
    found = []
    while pid > 0:
        found.append(pid)
        pid = _state_and_parent(pid)[1]
    return found


def processes(folder: Path) -> dict[int, str]:
    """Returns the living processes of the session: pid -> command line. Zombies hold nothing and are not counted."""
    marker = os.fsencode(folder)
    me = os.getpid()
    spared = set(_ancestry(me))
    found = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        if pid in spared or not alive(pid):
            continue
        cmdline = _read(f"/proc/{pid}/cmdline")
        if marker in cmdline or marker in _read(f"/proc/{pid}/environ") or me in _ancestry(pid):
            found[pid] = cmdline.replace(b"\0", b" ").decode(errors="replace").strip() or "?"
    return found


def mounts(folder: Path) -> list[str]:
    """Returns the mount points below the session's folder, innermost first."""
    prefix = str(folder) + "/"
    lines = _read("/proc/self/mountinfo").decode(errors="replace").splitlines()
    points = [line.split()[4].replace("\\040", " ") for line in lines]
    return [point for point in reversed(points) if point.startswith(prefix)]


def clusters(folder: Path) -> list[str]:
    """Returns the mount points below the session's folder of which there still is a run directory."""
    try:
        names = [name for name in os.listdir(BASE) if name.startswith(escape(str(folder)) + "-")]
    except FileNotFoundError:
        return []

    def character(match: re.Match[str]) -> str:
        return chr(int(match[1], 16))

    return ["/" + re.sub(r"\\x([0-9a-f]{2})", character, name.replace("-", "/")) for name in names]


def wait_until_clean(folder: Path, seconds: float = GRACE_SECONDS) -> list[str]:
    """Waits for the session's processes and mounts to go, and returns a sentence for each that did not."""
    deadline = time.monotonic() + seconds
    while True:
        found = [f"process {pid} is still there: {line}" for pid, line in processes(folder).items()]
        found += [f"still mounted: {point}" for point in mounts(folder)]
        found += [f"a cluster has not been taken down: {mount}" for mount in clusters(folder)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def sweep(folder: Path) -> None:
    """Removes what is left, so that one failure does not become the next session's."""
    for mount in clusters(folder):
        down = [sys.executable, "-m", "bpfs.cli.bpcluster", "down", "--mount", mount]
        subprocess.run(down, cwd=Path(__file__).parent.parent, timeout=60, check=False)
    for pid in processes(folder):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    libc = ctypes.CDLL(None, use_errno=True)
    for point in mounts(folder):
        libc.umount2(os.fsencode(point), MNT_DETACH)
