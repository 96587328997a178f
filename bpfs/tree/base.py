# SPDX-License-Identifier: GPL-2.0-or-later
"""What a tree is, whoever serves it: the words that the mount, the local tree and the remote tree share.

A path is a tuple of names below the root. Errors are `BpfsError` (errno and sentence); the mount turns them into errno.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from errno import EINVAL
from typing import NamedTuple, Protocol, TypeAlias

import trio

from bpfs.errors import BpfsError

Path: TypeAlias = tuple[str, ...]

MASTER = -1
"""The number of the master itself among the nodes."""

TEXT_LIMIT = 4096
"""Bytes of the longest verb: PIPE_BUF of Linux, so that a line written at once has always been one write."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `pid` is the cluster's pid, 0 where there is none; `uid` and `gid` are those of a file's opener."""

    pid: int
    uid: int
    gid: int
    node: int = MASTER


class Attributes(NamedTuple):
    """What stat(2) and the mount have to know of an entry."""

    mode: int  # type and permission bits, as st_mode
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    # What the name means, where that can change: with another identity (a pid in use again) it is another inode.
    identity: object = None
    # The kernel may keep the name and the attributes until told otherwise (`Tree.listen`).
    lasting: bool = False
    # A file with verbs: every writer gets an inode of its own, so its name is looked up each time.
    control: bool = False

    @property
    def is_dir(self) -> bool:
        """Whether the entry is a directory."""
        return stat.S_ISDIR(self.mode)


@dataclass(frozen=True, slots=True)
class Changes:
    """What chown(2), chgrp and chmod(2) want; None: as it is."""

    uid: int | None = None
    gid: int | None = None
    mode: int | None = None  # permission bits only


class WriteRequest:
    """One write(2) to a control file: one verb.

    Args:
        caller: who writes. `pid` is the process that waits in the write.
        text: the line without its line end, stripped; never empty, never more than one line.
    """

    def __init__(self, caller: Caller, text: str) -> None:
        self.caller = caller
        self.text = text
        self._answered = trio.Event()
        self.interrupted = trio.Event()
        """Set when the writer was interrupted (see `let_go`) or its node was lost."""
        self.may_interrupt = False

    @property
    def words(self) -> list[str]:
        """The text, split at blanks."""
        return self.text.split()

    async def answer(self) -> bool:
        """Lets the write return with success now, while the handler goes on: the writer is about to be moved itself.

        Returns:
            True when the write was still waiting; False when it had been answered before.
        """
        fresh = not self._answered.is_set()
        self._answered.set()
        return fresh

    def let_go(self) -> None:
        """Lets ^C and SIGKILL end the writer's wait (with EINTR). The handler goes on; `interrupted` tells it."""
        self.may_interrupt = True

    @property
    def answered(self) -> bool:
        """Whether the write has returned already."""
        return self._answered.is_set()

    async def wait_answered(self) -> None:
        """Blocks until `answer` was called."""
        await self._answered.wait()


class Handle(Protocol):
    """An open file."""

    @property
    def blocking(self) -> bool:
        """Whether reads may wait for something to happen."""

    def may_interrupt(self) -> bool:
        """Whether a signal to its caller may end the read or write that waits now."""

    async def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes; empty at the end. A blocking read may be cancelled."""

    async def write(self, offset: int, data: bytes, caller: Caller) -> int:
        """Hands one verb in; returns when it is done (or answered). May be cancelled: then the verb goes on."""

    async def close(self) -> None:
        """Gives the file back."""


Listener: TypeAlias = Callable[[Path, bool], None]
"""Called with a path and whether the name has gone, on the trio thread; must not block."""


class Tree(Protocol):
    """A file tree."""

    async def getattr(self, path: Path, caller: Caller) -> Attributes:
        """Raises ENOENT where there is none."""

    async def listdir(self, path: Path, caller: Caller) -> Sequence[tuple[str, Attributes]]:
        """Names and attributes, in order."""

    async def readlink(self, path: Path, caller: Caller) -> str:
        """Where a symbolic link points."""

    async def open(self, path: Path, caller: Caller, flags: int) -> Handle:
        """Opens a file; `flags` as in open(2). The kernel has judged the mode already."""

    async def setattr(self, path: Path, caller: Caller, changes: Changes) -> Attributes:
        """chown, chgrp, chmod. EPERM where there is nothing to set."""

    async def getxattr(self, path: Path, caller: Caller, name: str) -> bytes:
        """An extended attribute. ENODATA where there is none, EOPNOTSUPP where there can be none."""

    async def listxattr(self, path: Path, caller: Caller) -> Sequence[str]:
        """The names of all extended attributes."""

    async def setxattr(self, path: Path, caller: Caller, name: str, value: bytes | None) -> None:
        """Sets an extended attribute, or removes it."""

    def listen(self, listener: Listener) -> None:
        """Has `listener` called with every change of what is `lasting`."""


def one_line(data: bytes, limit: int = TEXT_LIMIT) -> str:
    """The text of one write: one line of UTF-8, stripped.

    Raises:
        BpfsError: EINVAL for nothing at all, more than one line, more than `limit` bytes, NUL, or bytes that are
        no UTF-8.
    """
    if len(data) > limit:
        raise BpfsError(EINVAL, f"{len(data)} bytes are more than a line of {limit}")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise BpfsError(EINVAL, "the text is no UTF-8") from None
    text = text.strip()
    if not text:
        raise BpfsError(EINVAL, "nothing was written")
    # str.splitlines knows more line ends than a shell does, and all of them are nonsense here.
    if len(text.splitlines()) > 1 or "\0" in text:
        raise BpfsError(EINVAL, "one line a write, please")
    return text
