# SPDX-License-Identifier: GPL-2.0-or-later
"""A directory is a table of entries; this module is the vocabulary of such tables.

A table is written once and serves any number of objects: the functions in it get the object first. ``nodes/7/load`` is
the entry ``load`` of the table of a node, called with node 7::

    NODE: Table[Node] = Table(
        File("load", "as /proc/loadavg of the node", read=lambda node: node.sample.load + "\\n"),
        File("state", "the node's state; write the wanted one", read=read_state, write=write_state, mode=0o644),
        File("events", "a line an event, from the opening on", follow=follow_node),
        Link("procs", ...),
    )
    ROOT: Table[Cluster] = Table(
        Collection("nodes", "a directory a node", names=list_nodes, lookup=find_node, table=NODE, access=node_access),
    )

Entry kinds:

- `File`: ``read(object)`` gives str or bytes, plain or awaitable. ``blocks=True``: the read waits for something
  (``wait``), ^C ends it. ``write(object, request)`` gets a `WriteRequest` (caller, text) and returns, or raises
  `BpfsError`, when the thing is done; plain or async. ``follow(object)`` opens a stream of texts: each read(2) waits
  for the next one.
- `Control`: a file whose writes are verbs from a table and whose read lists them (unless it has a read of its own).
- `Link`: ``target(object, caller)``.
- `Directory`: a fixed name with a table of its own, for ``bind(object)``.
- `Collection`: a directory whose names come and go: ``names(object)`` and ``lookup(object, name)``; a member is a
  directory with `table`, or, with `link`, a symbolic link.

Modes: `mode` is the default; `access(object)` gives owner, group and mode of an object where they differ from object to
object.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from errno import EINVAL
from inspect import isawaitable
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from bpfs.errors import BpfsError
from bpfs.tree.base import TEXT_LIMIT, Attributes, Caller, Changes, Path, WriteRequest

T = TypeVar("T")
Content: TypeAlias = str | bytes

__all__ = [
    "Access", "Attributes", "Caller", "Changes", "Collection", "Content", "Control", "Directory", "Entry", "File",
    "Link", "Path", "Stream", "Table", "Verb", "WriteRequest",
]  # fmt: skip


class Access(NamedTuple):
    """Owner, group and permission bits of an entry."""

    uid: int = 0
    gid: int = 0
    mode: int = 0o444


class Stream(Protocol):
    """What a `follow` function opens: texts, one after the other, from the call on."""

    async def __anext__(self) -> Content:
        """Waits for the next text; StopAsyncIteration is the end of the file."""

    async def aclose(self) -> None:
        """The file was closed."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """What all entries have. `help` is a line for people and for the man page."""

    name: str
    help: str
    mode: int = field(default=0o444, kw_only=True)
    access: Callable[[T], Access] | None = field(default=None, kw_only=True)
    lasting: bool = field(default=True, kw_only=True)
    """The kernel may keep name and attributes until `LocalTree.changed` or `LocalTree.gone` says otherwise."""


@dataclass(frozen=True)
class File(Entry[T]):
    """A file. See the module's head."""

    read: Callable[[T], Content | Awaitable[Content]] | None = None
    write: Callable[[T, WriteRequest], Awaitable[None] | None] | None = None
    follow: Callable[[T], Stream] | None = None
    limit: int = TEXT_LIMIT
    """Bytes of the longest line that can be written, on the master."""
    blocks: bool = False
    """`read` waits: its size is unknown and ^C of the caller ends it."""
    sized: bool = False
    """stat(2) tells the size of what `read` gives: only for contents that change together with `LocalTree.changed`.
    Others show 0, as in /proc, which makes every program read up to the end."""


@dataclass(frozen=True)
class Verb(Generic[T]):
    """One word that a control file understands. `arguments` is for people: ``PID [onexec]``."""

    name: str
    help: str
    run: Callable[[T, WriteRequest, list[str]], Awaitable[None] | None]
    arguments: str = ""
    least: int = 0
    most: int = 0


class Control(File[T]):
    """A file whose writes are verbs: the first word chooses, the rest are arguments.

    Args:
        name: of the file.
        help: a line.
        verbs: the table.
        read: what a reader gets; without it the list of verbs.
    """

    def __init__(
        self,
        name: str,
        help: str,
        *verbs: Verb[T],
        read: Callable[[T], Content | Awaitable[Content]] | None = None,
        mode: int = 0o644,
        access: Callable[[T], Access] | None = None,
    ) -> None:
        table = {verb.name: verb for verb in verbs}

        async def write(target: T, request: WriteRequest) -> None:
            first, *arguments = request.words
            verb = table.get(first)
            if verb is None:
                raise BpfsError(EINVAL, f"'{first[:40]}' is no verb of {name}; known: {' '.join(table)}")
            if not verb.least <= len(arguments) <= verb.most:
                raise BpfsError(EINVAL, f"usage: {verb.name} {verb.arguments}".rstrip())
            result = verb.run(target, request, arguments)
            if isawaitable(result):
                await result

        def listing(_: T) -> str:
            usages = {f"{verb.name} {verb.arguments}".rstrip(): verb.help for verb in verbs}
            width = max(map(len, usages), default=0)
            return "".join(f"{usage:<{width}}  {text}\n" for usage, text in usages.items())

        super().__init__(name, help, read=read or listing, write=write, mode=mode, access=access)


@dataclass(frozen=True)
class Link(Entry[T]):
    """A symbolic link."""

    target: Callable[[T, Caller], str]


@dataclass(frozen=True)
class Directory(Entry[T]):
    """A directory with a fixed name. `bind` makes the object of its table; without it the same object serves."""

    table: Table[Any]
    bind: Callable[[T], Any] | None = None
    mode: int = field(default=0o555, kw_only=True)


class Notes(Protocol):
    """Extended attributes of the members of a collection; all names begin with `prefix`."""

    prefix: str

    def names(self, target: Any) -> list[str]:
        """What a member has."""

    def get(self, target: Any, name: str) -> bytes:
        """Raises BpfsError ENODATA."""

    def set(self, target: Any, caller: Caller, name: str, value: bytes) -> None:
        """Raises BpfsError."""

    def remove(self, target: Any, caller: Caller, name: str) -> None:
        """Raises BpfsError."""


@dataclass(frozen=True)
class Collection(Entry[T]):
    """A directory whose names come and go.

    `names` lists in the order wanted; `lookup` gives the object of a name or None. Members are directories served by
    `table`, with `member_access`, or, where `link` is given, symbolic links. `member_change` serves chown, chgrp and
    chmod on a member. `member_key` tells when a name has come to mean something else (a pid in use again): who is in a
    directory whose key has changed finds nothing there any more. Without it the object itself is the key, and `lookup`
    has to give the same one as long as the name means the same.
    """

    names: Callable[[T], Iterable[str]]
    lookup: Callable[[T, str], Any]
    table: Table[Any] | None = None
    fixed: Table[T] | None = None
    """Entries that are always there, beside the members; they get the collection's own object."""
    link: Callable[[Any, Caller], str] | None = None
    member_access: Callable[[Any], Access] | None = None
    member_change: Callable[[Any, Caller, Changes], Awaitable[None] | None] | None = None
    member_notes: Notes | None = None
    member_key: Callable[[Any], object] | None = None
    member_lasting: bool = True
    """False: names of members are asked for each time (pids come and go quickly)."""
    mode: int = field(default=0o555, kw_only=True)


class Table(Generic[T]):
    """The entries of a directory, in the order of listing. Names are unique."""

    def __init__(self, *entries: Entry[T]) -> None:
        self._entries = {entry.name: entry for entry in entries}
        if len(self._entries) != len(entries):
            raise ValueError("a name stands twice in a table")

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def get(self, name: str) -> Entry[T] | None:
        """The entry of a name, or None."""
        return self._entries.get(name)

    def extended(self, *entries: Entry[T]) -> Table[T]:
        """A table with more entries: the seam by which a component adds files to another's directory."""
        return Table(*self._entries.values(), *entries)
