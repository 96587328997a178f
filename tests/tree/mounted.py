# SPDX-License-Identifier: GPL-2.0-or-later
"""Starts a daemon with a mount for a test, and leaves nothing of it behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bpfs import kernel

TOP = Path(__file__).resolve().parents[2]

DEADLINE = 60.0
"""Seconds after which something that should happen is taken for something that never will."""


class Daemon:
    """A running daemon of a module of this folder."""

    def __init__(self, module: str, mountpoint: Path, *arguments: str) -> None:
        self.mountpoint = mountpoint
        self.log = mountpoint.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"tests.tree.{module}", str(mountpoint), *arguments],
                cwd=TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        try:
            self.expect("ready")
        except BaseException:
            self.end()
            raise

    def expect(self, line: str) -> None:
        """Waits for a line of the daemon's output."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], DEADLINE)
        got = self.process.stdout.readline() if readable else "nothing"
        assert got == f"{line}\n", f"{got!r} instead of {line!r}; log: {self.log.read_text()}"

    def tell(self, line: str) -> None:
        """Sends lines to the daemon, and waits until it has obeyed them all."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\ndone\n")
        self.process.stdin.flush()
        self.expect("done")

    def end(self) -> None:
        """Ends the daemon, and its mount whatever happens."""
        try:
            self.process.terminate()
            self.process.wait(DEADLINE)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.close()
            self.process.stdout.close()
            while is_mounted(self.mountpoint):
                kernel.umount(str(self.mountpoint))


@contextmanager
def mounted(folder: Path, module: str = "daemon", *arguments: str) -> Iterator[Daemon]:
    """A daemon with a mount below `folder`; nothing unforeseen may be in its log."""
    mountpoint = Path(tempfile.mkdtemp(prefix="m", dir=folder))
    daemon = Daemon(module, mountpoint, *arguments)
    try:
        yield daemon
    finally:
        daemon.end()
    log = daemon.log.read_text()
    assert "Traceback" not in log, log


def is_mounted(path: Path) -> bool:
    """Whether something is mounted there, without touching it."""
    return any(line.split()[1] == str(path) for line in Path("/proc/self/mounts").read_text().splitlines())


def wait_until(what: str, condition: Callable[..., object], *arguments: object) -> None:
    """Polls until `condition`, called with `arguments`, holds."""
    end = time.monotonic() + DEADLINE
    while not condition(*arguments):
        assert time.monotonic() < end, f"in {DEADLINE:g} s it never came about that {what}"
        time.sleep(0.01)


def waits_in_kernel(pid: int, call: int) -> bool:
    """Whether a process sleeps in a system call with this number."""
    try:
        return Path(f"/proc/{pid}/syscall").read_text().split()[0] == str(call)
    except OSError:
        return False


def run(command: str, shell: str = "bash", cwd: Path | None = None, uid: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a line of shell, by a user without other groups."""
    as_user = {"user": uid, "group": uid, "extra_groups": []} if uid else {}
    return subprocess.run(
        [shell, "-c", command], cwd=cwd, capture_output=True, text=True, timeout=DEADLINE, check=False,
        env={**os.environ, "LC_ALL": "C"}, **as_user,
    )  # type: ignore[call-overload]  # fmt: skip


def end_child(process: subprocess.Popen[str]) -> None:
    """Kills a child whatever it does."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
