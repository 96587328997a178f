"""What else is in a directory, told along once a second name is looked up there: programs rarely look for one alone."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeAlias

from bpfs.view.protocol import Entry

KEPT = 20_000
"""Names kept of all directories together, about 10 MB; those of the directory asked for longest ago go first."""

SEEN = 10_000
"""Directories of which is remembered that one name was looked up."""

Directory: TypeAlias = dict[str, Entry | None] | None
"""What is in one, by name, None for what was not looked at; None: too much, or nobody tells when it changes."""


class Beside:
    """What is known of directories, and holds until something changes in them. Belongs to whoever holds the lock."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Directory] = OrderedDict()
        self._seen: set[str] = set()
        self._names = 0

    def is_due(self, directory: str) -> bool:
        """Whether all of it should be asked for now: it is not the first time that a name there is not known."""
        if directory in self._known:
            return False
        if directory in self._seen:
            self._seen.discard(directory)
            return True
        if len(self._seen) >= SEEN:
            self._seen.clear()
        self._seen.add(directory)
        return False

    def keep(self, directory: str, entries: Directory) -> None:
        """Take in what there is."""
        self.forget(directory)
        self._known[directory] = entries
        self._names += _cost(entries)
        while self._names > KEPT:
            self._names -= _cost(self._known.popitem(last=False)[1])

    def of(self, directory: str) -> Directory:
        """What there is, where that is known."""
        return self._known.get(directory)

    def forget(self, directory: str) -> None:
        """Something has changed there."""
        if directory in self._known:
            self._names -= _cost(self._known.pop(directory))

    def forget_below(self, directory: str) -> None:
        """The same for all below it, and for itself."""
        self.forget(directory)
        prefix = directory.rstrip("/") + "/"
        for path in [path for path in self._known if path.startswith(prefix)]:
            self.forget(path)


def _cost(entries: Directory) -> int:
    return 1 + len(entries or ())
