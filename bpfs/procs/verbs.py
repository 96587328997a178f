"""The one line that is written to nodes/N/migrate: `PID [onexec] [close] [lazy] [strict] [tree]`."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from bpfs.errors import BpfsError

_HOW = {"onexec", "close", "lazy", "strict", "tree"}
_ALONE = {"onexec": {"close", "lazy", "tree"}, "tree": {"lazy", "strict"}}  # what does not go together

PID_LIMIT = 1 << 22  # PID_MAX_LIMIT of a 64-bit kernel, include/linux/threads.h


@dataclass(frozen=True, slots=True)
class MoveVerb:
    """What the writer asked for."""

    pid: int
    onexec: bool = False  # move at the next exec, not now
    close: bool = False  # sockets that cannot move are closed on the way
    lazy: bool = False  # what can of its memory comes when it runs there
    strict: bool = False  # its signals reach everybody, and its children have ghosts before it knows them
    tree: bool = False  # with all its descendants, or not at all


def parse_pid(word: str) -> int:
    """A pid as written by a user.

    Raises:
        BpfsError: EINVAL, not a number; ESRCH, no pid that a kernel could have given.
    """
    if not (word.isascii() and word.isdigit()) or len(word) > 20:
        raise BpfsError(errno.EINVAL, f"'{word[:40]}' is not a process id")
    pid = int(word)
    if not 0 < pid <= PID_LIMIT:
        raise BpfsError(errno.EINVAL if pid > PID_LIMIT else errno.ESRCH, f"there is no process {pid}")
    return pid


def parse_move(text: str) -> MoveVerb:
    """Reads a write to a migrate file.

    Raises:
        BpfsError: EINVAL with a sentence, for anything but `PID`, `PID onexec` and `PID` with `close`, `lazy` or both,
            each with `strict` or without; and `PID tree`, with `close` or without.
    """
    words = text.split()
    if not words:
        raise BpfsError(errno.EINVAL, "write a process id: PID, or that and onexec, close, lazy, strict or tree")
    if len(text.strip().splitlines()) > 1:
        raise BpfsError(errno.EINVAL, "write one line at a time")
    pid = parse_pid(words[0])
    how = set(words[1:])
    apart = any(word in how and how & others for word, others in _ALONE.items())
    if len(how) < len(words) - 1 or not how <= _HOW or apart:
        raise BpfsError(errno.EINVAL, f"'{' '.join(words[1:])[:40]}' is unknown; known: {', '.join(sorted(_HOW))}")
    return MoveVerb(pid, **dict.fromkeys(how, True))
