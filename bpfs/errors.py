"""Errors that carry both an errno (for the kernel) and a sentence (for a person).

Everything below the edges raises these; tree/ turns them into a FUSE errno, cli/ into one line on stderr and an
exit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from errno import ECONNRESET, EINVAL, EOPNOTSUPP, errorcode


def errno_name(code: int) -> str:
    """The name of an errno as errno(3) has it; 95 has two on Linux, and Python knows the other."""
    return "EOPNOTSUPP" if code == EOPNOTSUPP else errorcode.get(code, str(code))


class BpfsError(OSError):
    """What went wrong, as `errno` for programs and `sentence` for people.

    Args:
        errno: a number of errno(3).
        sentence: one line, no full stop, naming the object: ``node 7 is down``.
    """

    def __init__(self, errno: int, sentence: str) -> None:
        super().__init__(errno, sentence)
        # OSError types both as optional; here neither ever is.
        self.code: int = errno
        self.sentence: str = sentence

    def __str__(self) -> str:
        return self.sentence

    def __reduce__(self) -> tuple[type[BpfsError], tuple[int, str]]:
        return type(self), (self.code, self.sentence)


class ConfigError(BpfsError):
    """A configuration file or an option is wrong; the sentence names file and line."""

    def __init__(self, sentence: str) -> None:
        super().__init__(EINVAL, sentence)


class RemoteError(BpfsError):
    """The peer of a link refused or failed a request; errno and sentence are the peer's."""


class LinkClosed(BpfsError):
    """The link to a peer is gone; what was asked may or may not have happened there."""

    def __init__(self, sentence: str) -> None:
        super().__init__(ECONNRESET, sentence)


class ProtocolError(BpfsError):
    """The peer sent something that is no frame or message of ours."""

    def __init__(self, sentence: str) -> None:
        super().__init__(EINVAL, sentence)


class EngineRefused(BpfsError):
    """An engine worker could not do what it was asked.

    Args:
        errno: the worker's errno (EOPNOTSUPP where the process cannot be moved).
        sentence: the worker's sentence.
        refusals: every obstacle in words; empty where it is no matter of the process.
    """

    def __init__(self, errno: int, sentence: str, refusals: Sequence[str] = ()) -> None:
        super().__init__(errno or EOPNOTSUPP, sentence)
        self.refusals: tuple[str, ...] = tuple(refusals)


def first_error(group: BaseExceptionGroup[BpfsError]) -> BpfsError:
    """The first of the errors that several tasks raised together."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, BpfsError)
    return error
