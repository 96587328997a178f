# SPDX-License-Identifier: GPL-2.0-or-later
"""The numbers by which the kernel knows the entries of a mounted tree.

An inode lives from its first lookup until the kernel forgets it. Numbers are never used twice, so a late answer or a
late notification can never mean another entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NewType

from bpfs.tree.base import Attributes, Path

InodeNumber = NewType("InodeNumber", int)

ROOT = InodeNumber(1)  # FUSE_ROOT_ID, linux/fuse.h


class Inode:
    """An entry that the kernel knows."""

    __slots__ = ("children", "gone", "identity", "lookups", "name", "number", "parent", "path", "taken")

    def __init__(self, number: InodeNumber, parent: Inode | None, name: str, identity: object) -> None:
        self.number = number
        self.parent = parent
        self.name = name
        self.path: Path = () if parent is None else (*parent.path, name)
        self.identity = identity
        self.lookups = 0
        self.gone = False  # see `bury`
        self.children: dict[str, Inode] = {}
        # Inodes of names below that writers have for themselves.
        self.taken: set[Inode] = set()

    def below(self) -> Iterator[Inode]:
        """This inode and all known ones under it."""
        yield self
        yield from self.taken
        for child in self.children.values():
            yield from child.below()

    def bury(self) -> None:
        """The name means nothing, or something else, now; who is still in here finds nothing any more."""
        for inode in self.below():
            inode.gone = True


class InodeTable:
    """All inodes of one mount."""

    def __init__(self) -> None:
        self.root = Inode(ROOT, None, "", None)
        self._by_number: dict[int, Inode] = {ROOT: self.root}
        self._last = int(ROOT)

    def __len__(self) -> int:
        return len(self._by_number)

    def __getitem__(self, number: int) -> Inode:
        return self._by_number[number]

    def look_up(self, parent: Inode, name: str, attributes: Attributes) -> Inode:
        """The inode for an entry that is about to be told to the kernel; counts as one lookup."""
        known = parent.children.get(name)
        if known is not None and known.identity == attributes.identity:
            known.lookups += 1
            return known
        if known is not None:
            known.bury()
        self._last += 1
        inode = Inode(InodeNumber(self._last), parent, name, attributes.identity)
        inode.lookups = 1
        self._by_number[inode.number] = inode
        parent.children[name] = inode
        return inode

    def take(self, inode: Inode) -> bool:
        """Leaves an inode to who has it open; the next lookup of its name makes another one.

        The kernel lets one writer an inode in at a time, and who waits for it hears no signal: writers of one control
        file must not wait for each other.

        Returns:
            False where somebody has it already.
        """
        parent = inode.parent
        if parent is None or parent.children.get(inode.name) is not inode:
            return False
        del parent.children[inode.name]
        parent.taken.add(inode)
        return True

    def forget(self, number: int, count: int) -> None:
        """The kernel dropped `count` lookups."""
        inode = self._by_number.get(number)
        if inode is None or inode is self.root:
            return
        inode.lookups -= count
        if inode.lookups <= 0:
            del self._by_number[number]
            self._detach(inode)

    def find(self, path: Path) -> Inode | None:
        """The deepest known inode for `path`, or None."""
        inode = self.root
        for name in path:
            child = inode.children.get(name)
            if child is None:
                return None
            inode = child
        return inode

    def part(self, path: Path) -> tuple[InodeNumber, str] | None:
        """Lets a name mean nothing any more; gives parent and name, or None where the kernel knows no parent."""
        parent = self.find(path[:-1]) if path else None
        if parent is None:
            return None
        child = parent.children.pop(path[-1], None)
        if child is not None:
            child.bury()
        return parent.number, path[-1]

    def _detach(self, inode: Inode) -> None:
        parent = inode.parent
        if parent is None:
            return
        parent.taken.discard(inode)
        if parent.children.get(inode.name) is inode:
            del parent.children[inode.name]
