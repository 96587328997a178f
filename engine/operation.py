"""What the operations of a worker (engine/worker.py) have in common."""

from typing import Any, Final

TOKEN_SIZE: Final = 32  # by which a stream's two ends know each other
ORDER: Final = "out of order"
FDS: Final = "_fds"  # in an operation's result: descriptors to go with the reply

Reply = dict[str, Any]


def sentence(error: BaseException) -> str:
    """What to tell the user."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return f"{type(error).__name__}: {error}"
