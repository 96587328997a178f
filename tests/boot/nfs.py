"""A real server of NFS, in user space: nfs-ganesha, installed or unpacked by mountscripts/lib.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.boot.lab import ADDRESS, PACKAGES, Lab
from tests.cluster.virtual import wait_until

_CONFIG = """
NFS_CORE_PARAM {{
    Protocols = 4; Bind_addr = {address}; Enable_UDP = false; Enable_NLM = false; Enable_RQUOTA = false;
    Plugins_Dir = "{plugins}";
}}
NFSv4 {{ Graceless = true; RecoveryRoot = "{recovery}"; }}
EXPORT {{
    Export_Id = 1; Path = "{export}"; Pseudo = "{export}";
    Access_Type = RW; Squash = No_Root_Squash; SecType = sys; FSAL {{ Name = VFS; }}
}}
"""


@contextmanager
def serving(lab: Lab, export: Path) -> Iterator[None]:
    """A server on the master's address that gives a folder to whoever mounts it, under its own name."""
    unpacked = PACKAGES / "nfs"
    root = unpacked if (unpacked / "usr/bin/ganesha.nfsd").exists() else Path("/")
    program = root / "usr/bin/ganesha.nfsd"
    if not program.exists() or not shutil.which("mount.nfs4", path="/usr/sbin:/sbin"):
        pytest.skip(
            "no NFS server, or no mount.nfs4 (packages nfs-ganesha-vfs, nfs-common): ./mountscripts/check gets both"
        )
    libraries = [str(path) for path in (root / "usr/lib/ganesha", *root.glob("usr/lib/*-linux-gnu"))]
    (plugins,) = root.glob("usr/lib/*-linux-gnu/ganesha")
    recovery, config, log = lab.folder / "recovery", lab.folder / "ganesha.conf", lab.folder / "ganesha.log"
    recovery.mkdir()
    config.write_text(_CONFIG.format(address=ADDRESS, plugins=plugins, recovery=recovery, export=export))
    server = subprocess.Popen(
        [*lab.inside, program, "-F", "-L", log, "-f", config, "-p", lab.folder / "ganesha.pid"],
        stdin=subprocess.DEVNULL, env={**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)},
    )  # fmt: skip
    try:
        wait_until(lambda: log.exists() and "NFS SERVER INITIALIZED" in log.read_text(), "no NFS server")
        yield
    finally:
        server.kill()
        server.wait()
