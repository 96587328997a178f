"""The ghost programs that processes of ordinary users turn into: copies with file capabilities, which nobody can run by
himself.

They lie on a tmpfs of their own below the run directory: it may be mounted without nosuid wherever /run and /var are,
only root gets into it, and nothing of it outlives the cluster.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bpfs import kernel, log
from bpfs.procs.ghost import EXECUTABLE
from engine.ghosting import grant_rights

_log = log.get("procs")


class Programs:
    """A context manager. `folder` is made, mounted, and gone again in the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._plain = -1
        self._granting: dict[int, int] = {}  # capabilities of the process -> descriptor
        self._mounted = False

    def __enter__(self) -> Programs:
        self._plain = os.open(EXECUTABLE, os.O_PATH | os.O_CLOEXEC)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            unmount(self._folder)  # that of a master which was killed
            kernel.mount("bpfs", str(self._folder), "tmpfs", kernel.MS_NODEV, "mode=0700,size=16m")
            self._mounted = True
        except OSError as error:
            _log.warning("ghosts of ordinary users get no rights for the way home: %s", error)
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (self._plain, *self._granting.values()):
            os.close(fd)
        self._granting.clear()
        if self._mounted:
            unmount(self._folder)
            self._folder.rmdir()

    def descriptor(self, pid: int, euid: int, rights: int) -> int:
        """The program for a process: O_PATH, and the table's own, but for those of other mount namespaces.

        Args:
            rights: its permitted capabilities, a bit each.
        """
        if euid == 0 or not self._mounted:
            return self._plain
        try:
            if rights not in self._granting:
                self._granting[rights] = self._make(rights)
            return self._granting[rights]
        except OSError as error:
            _log.warning("the ghost of process %d gets no rights for the way home: %s", pid, error)
            return self._plain

    def _make(self, rights: int) -> int:
        path = self._folder / f"ghost.{rights:x}"
        shutil.copyfile(EXECUTABLE, path)
        path.chmod(0o755)
        grant_rights(str(path), rights)
        return os.open(path, os.O_PATH | os.O_CLOEXEC)


def unmount(folder: Path) -> None:
    """Take away whatever is mounted there; ghosts that still run go on."""
    while os.path.ismount(folder):
        kernel.umount(str(folder))
