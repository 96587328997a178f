# SPDX-License-Identifier: GPL-2.0-or-later
"""A view of /proc in which processes of nodes have the state, times and memory that they have there.

For unmodified programs: in a mount namespace of its own, whoever runs below this process finds stat, status and statm
of each ghost covered by files with what the node tells. Nobody else sees them, nothing is left when the namespace ends,
and nothing is asked of any node while nobody looks.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from queue import Empty, SimpleQueue

from bpfs import kernel
from bpfs.client import Cluster
from bpfs.procs.pstext import FILES, merge_stat, merge_status
from engine.linux.procfs import own_file

_READERS = 8
_PATIENCE_S = 1.0
"""For all answers together: of a node that is silent the ghosts' own figures are shown, or the last ones known."""


class PsView:
    """The covered files. Making it leaves the mount namespace; needs root."""

    def __init__(self, cluster: Cluster) -> None:
        """Raises OSError."""
        self._cluster = cluster
        self._files: dict[tuple[int, str], int] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="bpps-")
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)

    def close(self) -> None:
        """Removes the folder; the mounts go with the last process of the namespace."""
        self._folder.cleanup()

    def refresh(self) -> None:
        """Asks for everything anew, covers files of processes that have come, and rewrites those of the others."""
        found = self._ask(list(self._cluster.procs))
        for pid, texts in found.items():
            try:
                self._show(pid, texts)
            except (OSError, ValueError, IndexError):
                self._forget(pid)  # it has ended, and with its directory the mounts
        for pid in {pid for pid, _ in self._files} - found.keys():
            if not os.path.exists(f"/proc/{pid}"):
                self._forget(pid)

    def keep_fresh(self, seconds: float) -> None:
        """Refreshes for as long as this process lives, in a thread of the same namespace."""

        def run() -> None:
            while True:
                time.sleep(seconds)
                try:
                    self.refresh()
                except OSError:
                    pass  # the cluster has gone: the last figures stay

        threading.Thread(target=run, name="refresh", daemon=True).start()

    def _ask(self, pids: Iterable[int]) -> dict[int, list[bytes]]:
        todo: SimpleQueue[int] = SimpleQueue()
        answers: SimpleQueue[tuple[int, list[bytes]]] = SimpleQueue()
        wanted = 0
        for pid in pids:
            todo.put(pid)
            wanted += 1

        def work() -> None:
            while True:
                try:
                    pid = todo.get_nowait()
                except Empty:
                    return
                folder = self._cluster.mount / "procs" / str(pid)
                try:
                    answers.put((pid, [(folder / name).read_bytes() for name in FILES]))
                except OSError:
                    answers.put((pid, []))

        for _ in range(min(_READERS, wanted)):
            threading.Thread(target=work, daemon=True).start()
        found, deadline = {}, time.monotonic() + _PATIENCE_S
        for _ in range(wanted):
            try:
                pid, texts = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                break
            if texts:
                found[pid] = texts
        return found

    def _show(self, pid: int, texts: list[bytes]) -> None:
        own = Path(own_file(pid, "stat")).read_bytes()
        texts = [merge_stat(texts[0], own), merge_status(texts[1], own), *texts[2:]]
        for name, text in zip(FILES, texts, strict=True):
            self._write(pid, name, text)

    def _write(self, pid: int, name: str, text: bytes) -> None:
        fd = self._files.get((pid, name), -1)
        if fd < 0:
            path = f"{self._folder.name}/{pid}.{name}"
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o444)
            try:
                os.write(fd, text)
                kernel.mount(path, f"/proc/{pid}/{name}", "", kernel.MS_BIND)
            except OSError:
                os.close(fd)
                raise
            finally:
                os.unlink(path)
            self._files[pid, name] = fd
        else:
            os.pwrite(fd, text, 0)
            os.ftruncate(fd, len(text))

    def _forget(self, pid: int) -> None:
        for name in FILES:
            fd = self._files.pop((pid, name), -1)
            if fd >= 0:
                os.close(fd)
