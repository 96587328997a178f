"""The daemon's inodes, and the journal by which a daemon that starts again knows them.

Every change is in the journal before the kernel hears of it. The journal is a file in the cache directory, made
small again whenever it has outgrown what it tells.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from bpfs.view.fuse import ROOT
from bpfs.view.protocol import Attributes

SLACK = 8 << 20
"""Bytes that the journal may grow beyond its size after the last rewriting."""


@dataclass(slots=True)
class Node:
    """One inode.

    Attributes:
        path: on the master; what the node was made for, also when the name leads to another one now.
        attributes: as they were told last; None: not yet.
        target: of a symbolic link.
        digest: of a regular file; empty: not known yet.
        capability: file capabilities.
        fresh: a change would have been told, so nobody needs to be asked.
        lookups: as the kernel counts them.
        opens: open files of the kernel's that this daemon has seen; those of an earlier one are not counted.
        backing: passthrough id; 0: none.
        fd: the object; -1: not open in this daemon.
        listing: names and types of a directory, while nothing has changed in it.
        reading: as it was listed last, for who has it open.
    """

    number: int
    path: str
    attributes: Attributes | None = None
    target: str = ""
    digest: str = ""
    capability: bytes = b""
    fresh: bool = False
    lookups: int = 0
    opens: int = 0
    backing: int = 0
    fd: int = -1
    listing: list[tuple[str, int]] | None = field(default=None, repr=False)
    reading: list[tuple[str, int]] = field(default_factory=list, repr=False)


class Nodes:
    """All inodes. Belongs to whoever holds the daemon's lock."""

    def __init__(self, journal: Path) -> None:
        self.by_number: dict[int, Node] = {ROOT: Node(ROOT, "/")}
        self.by_path: dict[str, Node] = {"/": self.by_number[ROOT]}
        self.passthrough = self.resend = self.started = False
        self.dropped: Callable[[Node], None] = lambda node: None  # the kernel has forgotten one
        self.waiting: dict[int, bytes] = {}  # requests under way, where the kernel does not send them again
        self._path = journal
        self._next = ROOT + 1
        self._size = self._base = 0
        try:
            self._replay(journal.read_bytes())
        except FileNotFoundError:
            pass
        self._fd = -1
        self._rewrite()

    # -- changes -----------------------------------------------------------------------------------

    def start(self, passthrough: bool, resend: bool) -> None:
        """The kernel has greeted."""
        self._do("start", passthrough, resend)

    def enter(self, path: str, known: list[Any]) -> Node:
        """Find or make the node of a path and set what is known of it: attributes, target, digest, fresh,
        capability."""
        node = self.by_path.get(path)
        if node is None:
            self._do("new", self._next, path)
            node = self.by_path[path]
        self._do("know", node.number, *known)
        return node

    def looked_up(self, node: Node) -> None:
        """The kernel is about to be told of it."""
        self._do("look", node.number, 1)

    def forget(self, number: int, count: int) -> None:
        """The kernel forgets some look-ups."""
        if number in self.by_number:
            self._do("look", number, -count)

    def has_digest(self, node: Node, digest: str) -> None:
        """The content is known."""
        self._do("digest", node.number, digest)

    def has_backing(self, node: Node, backing: int) -> None:
        """Open files of it are passed through from now on; 0: no more."""
        self._do("back", node.number, backing)

    def detach(self, path: str) -> Node | None:
        """The name leads elsewhere now: its next look-up makes another node."""
        node = self.by_path.get(path)
        if node is not None and node.number != ROOT:
            self._do("detach", path)
            return node
        return None

    def began(self, unique: int, request: bytes) -> None:
        """A request goes over the network."""
        if not self.resend:
            self._do("wait", unique, request)

    def ended(self, unique: int) -> None:
        """It is answered."""
        if not self.resend:
            self._do("done", unique)

    # -- the journal -------------------------------------------------------------------------------

    def _do(self, *record: Any) -> None:
        data = msgpack.packb(record, use_bin_type=True, unicode_errors="surrogateescape")
        self._apply(*record)
        os.write(self._fd, data)
        self._size += len(data)
        if self._size > self._base + SLACK:
            self._rewrite()

    def _apply(self, what: str, *rest: Any) -> None:
        getattr(self, f"_apply_{what}")(*rest)

    def _apply_start(self, passthrough: bool, resend: bool) -> None:
        self.passthrough, self.resend, self.started = passthrough, resend, True

    def _apply_new(self, number: int, path: str) -> None:
        self.by_number[number] = self.by_path[path] = Node(number, path)
        self._next = max(self._next, number + 1)

    def _apply_next(self, number: int) -> None:
        self._next = number

    def _apply_know(self, number: int, *known: Any) -> None:
        node = self.by_number[number]
        attributes, node.target, digest, node.fresh, node.capability = known
        node.attributes = Attributes(*attributes) if attributes is not None else None
        node.digest = digest or node.digest

    def _apply_look(self, number: int, count: int) -> None:
        node = self.by_number[number]
        node.lookups += count
        if node.lookups <= 0 and number != ROOT:  # none of it is open, either
            del self.by_number[number]
            if self.by_path.get(node.path) is node:
                del self.by_path[node.path]
            self.dropped(node)

    def _apply_digest(self, number: int, digest: str) -> None:
        self.by_number[number].digest = digest

    def _apply_back(self, number: int, backing: int) -> None:
        self.by_number[number].backing = backing

    def _apply_detach(self, path: str) -> None:
        self.by_path.pop(path, None)

    def _apply_wait(self, unique: int, request: bytes) -> None:
        self.waiting[unique] = request

    def _apply_done(self, unique: int) -> None:
        self.waiting.pop(unique, None)

    def _replay(self, data: bytes) -> None:
        unpacker = msgpack.Unpacker(unicode_errors="surrogateescape", max_buffer_size=0)
        unpacker.feed(data)
        for record in unpacker:  # a record that was cut off by a crash ends it: the kernel has not heard of it
            self._apply(*record)

    def _rewrite(self) -> None:
        records: list[tuple[Any, ...]] = [("start", self.passthrough, self.resend)] if self.started else []
        records.append(("next", self._next))
        for node in self.by_number.values():
            records += _records(node, self.by_path.get(node.path) is node)
        records += [("wait", unique, request) for unique, request in self.waiting.items()]
        pack = msgpack.Packer(use_bin_type=True, unicode_errors="surrogateescape").pack
        data = b"".join(map(pack, records))
        temporary = self._path.with_suffix(".new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.rename(temporary, self._path)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._size, self._base = fd, len(data), len(data)


def _records(node: Node, attached: bool) -> list[tuple[Any, ...]]:
    made: list[tuple[Any, ...]] = [] if node.number == ROOT else [("new", node.number, node.path)]
    made.append(("know", node.number, node.attributes, node.target, node.digest, node.fresh, node.capability))
    if node.backing:
        made.append(("back", node.number, node.backing))
    made.append(("look", node.number, node.lookups))
    if not attached:
        made.append(("detach", node.path))
    return made
