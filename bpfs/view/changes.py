"""What has changed on the master: what of the kernel's knowledge must go, and which answers came too late to keep."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable

from bpfs.view.beside import Beside
from bpfs.view.core import Core
from bpfs.view.nodes import Node
from bpfs.view.protocol import Attributes, Change
from bpfs.view.remote import Remote

RETRY = 0.2
"""Seconds between attempts to hear of changes again."""

ABSENT_KEPT = 100_000
"""Names that are known not to be there; more are asked for each time."""


class Changes:
    """Hears, and tells the kernel.

    Attributes:
        absent: paths that lead to nothing.
        beside: what directories have in them.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self.absent: set[str] = set()
        self.beside = Beside()
        self._listening = False
        self._epoch = 0
        self._changed: dict[str, int] = {}
        self._all_changed = 0

    @property
    def epoch(self) -> int:
        """Counts changes: to be taken before the master is asked, and given to `may_keep` with the answer."""
        return self._epoch

    def may_keep(self, directory: str, epoch: int) -> bool:
        """Whether an answer about a name in this directory still holds."""
        return self._listening and self._all_changed <= epoch and self._changed.get(directory, 0) <= epoch

    def run(self, remote: Remote) -> None:
        """Hear for ever; for a thread of its own."""
        while True:
            try:
                for directory, name, kind in remote.events():
                    if kind < 0:
                        self._listening = True
                        self.change("/", "", Change.ALL)
                    else:
                        self.change(directory, name, Change(kind))
            except (OSError, ValueError):
                pass  # the master is silent or gone: what is known is kept, what is new is not
            self._listening = False
            remote.close()
            time.sleep(RETRY)

    def change(self, directory: str, name: str, kind: Change) -> None:
        """Take in one change."""
        nodes = self._core.nodes
        with self._core.lock:
            self._epoch += 1
            if kind is Change.ALL:
                self._all_changed = self._epoch
                self.beside.forget_below(directory)
                paths = _below((*nodes.by_path, *self.absent), directory)
            else:
                self._changed[directory] = self._epoch
                path = directory.rstrip("/") + "/" + name if name else directory
                paths = [path]
                if _is_directory(nodes.by_path.get(path)) and kind is Change.ENTRY:
                    paths += _below((*nodes.by_path, *self.absent), path)
                    self.beside.forget_below(path)
            told = [action for path in [*paths, directory] for action in self._outdate(path)]
        for action in told:
            action()

    def _outdate(self, path: str) -> list[Callable[[], None]]:
        """Believe no more what is known of a path; gives what is to be told to the kernel."""
        nodes, device, found = self._core.nodes, self._core.device, []
        self.absent.discard(path)
        parent, _, name = path.rpartition("/")
        self.beside.forget(parent or "/")
        above, node = nodes.by_path.get(parent or "/"), nodes.by_path.get(path)
        if above is not None and name:
            found.append(lambda: device.forget_name(above.number, os.fsencode(name)))
        if node is not None:
            node.fresh = False
            if path == "/" or _is_directory(node):
                node.listing = None
                found.append(lambda: device.forget_content(node.number))
        return found

    def replace(self, node: Node, attributes: Attributes) -> bool:
        """Whether these are not of what the node was made for: then its path leads to a new node from now on."""
        if node.attributes is None or not is_another(node.attributes, attributes):
            return False
        nodes = self._core.nodes
        for path in [node.path, *(_below(nodes.by_path, node.path) if _is_directory(node) else ())]:
            nodes.detach(path)
        return True


def is_another(old: Attributes, new: Attributes) -> bool:
    """Whether these are of another object or of another content."""
    if stat.S_ISDIR(old.mode) and stat.S_ISDIR(new.mode):
        return old.ino != new.ino
    # A change of mode or owner is one, too (ctime): a new inode is asked for its rights.
    return (old.mode, old.ino, old.size, old.mtime_ns, old.ctime_ns) != (
        new.mode, new.ino, new.size, new.mtime_ns, new.ctime_ns,
    )  # fmt: skip


def _is_directory(node: Node | None) -> bool:
    return node is not None and node.attributes is not None and stat.S_ISDIR(node.attributes.mode)


def _below(paths: Iterable[str], directory: str) -> list[str]:
    prefix = directory.rstrip("/") + "/"
    return [path for path in paths if path.startswith(prefix) and path != "/"]
