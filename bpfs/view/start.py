"""Starting the programs of this room: by exec, with nothing imported that they do not need, so in some 50 ms."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def start(module: str, fds: Sequence[int], *arguments: str) -> subprocess.Popen[bytes]:
    """Start `bpfs.view.MODULE` with descriptors; their numbers are its first arguments. Raises OSError."""
    # Without site (-S), whose .pth files take longer than all of ours; what it would find is in the path.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-S", "-m", f"bpfs.view.{module}", *map(str, fds), *arguments]
    # On a node image the interpreter finds its own files by these two.
    kept = {name: os.environ[name] for name in ("PYTHONHOME", "LD_LIBRARY_PATH") if name in os.environ}
    environment = {"PYTHONPATH": path, **kept}
    return subprocess.Popen(command, pass_fds=fds, env=environment, cwd="/", stdin=subprocess.DEVNULL)
