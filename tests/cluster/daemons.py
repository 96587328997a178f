"""Daemons as an administrator starts them: by command line and configuration file."""

from __future__ import annotations

import signal
import subprocess
import sys

from tests.cluster.virtual import TOP


def start(module: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Starts a daemon of `bpfs.cli`; its arguments have to keep it in the foreground."""
    command = [sys.executable, "-m", f"bpfs.cli.{module}", *map(str, arguments)]
    return subprocess.Popen(command, cwd=TOP, stdin=subprocess.DEVNULL)


def end(daemon: subprocess.Popen[bytes]) -> None:
    """Ends it in peace, or at last by force."""
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(30)
    finally:
        daemon.kill()
        daemon.wait()
