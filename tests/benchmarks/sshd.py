# SPDX-License-Identifier: GPL-2.0-or-later
"""A real sshd for comparisons: on a port of its own, with keys that are thrown away, for as long as a benchmark lasts.

The program is this machine's, or that of the package that mountscripts/lib.sh has unpacked beside the environment; it
runs in a mount namespace with the user that it wants to drop its rights to.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.cluster.virtual import TOP

UNPACKED = TOP / ".venv" / "sshd"
PATIENCE = 10.0  # seconds until it answers

_START = """
mount --bind {folder}/passwd /etc/passwd && mount -t tmpfs none /run && mkdir -m 755 /run/sshd &&
exec env LD_LIBRARY_PATH={libraries} {program} -D -e -f {folder}/config
"""
_CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PidFile none
PrintMotd no
MaxStartups 200
"""


def program() -> Path | None:
    """Where an sshd is, or None."""
    unpacked = UNPACKED / "usr/sbin/sshd"
    found = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    return Path(found) if found else unpacked if unpacked.exists() else None


@contextmanager
def sshd() -> Iterator[list[str] | None]:
    """Gives the words before a remote command, ``ssh ... localhost``; None where there is no sshd, or no ssh."""
    daemon = program()
    if daemon is None or shutil.which("ssh") is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="bench-sshd-") as name:
        folder = Path(name)
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            port = free.getsockname()[1]
        users = Path("/etc/passwd").read_text().splitlines()
        users = [line for line in users if not line.startswith("sshd:")] + ["sshd:x:65533:65534::/run/sshd:/bin/false"]
        (folder / "passwd").write_text("".join(f"{line}\n" for line in users))
        (folder / "config").write_text(_CONFIG.format(folder=folder, port=port))
        script = _START.format(folder=folder, libraries=UNPACKED / "usr/lib/x86_64-linux-gnu", program=daemon)
        command = ["unshare", "-m", "--propagation", "private", "sh", "-c", script]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                _wait(port)
                yield [
                    "ssh", "-F", "none", "-p", str(port), "-i", str(folder / "user"), "-o", "BatchMode=yes",
                    "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={folder}/known",
                    "-o", "LogLevel=ERROR", "localhost",
                ]  # fmt: skip
            finally:
                process.terminate()


def _wait(port: int) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < end, f"no sshd within {PATIENCE:g} s"
            time.sleep(0.02)
