"""What the operations of a worker (engine/worker.py) have in common."""

import contextlib
import os
import sys
import traceback
from typing import Any, Final

TOKEN_SIZE: Final = 32  # by which a stream's two ends know each other
ORDER: Final = "out of order"
NOT_LAZY: Final = f"the kernel of {os.uname().nodename} cannot have memory come later (userfaultfd with events)"
FDS: Final = "_fds"  # in an operation's result: descriptors to go with the reply

Reply = dict[str, Any]


def report(error: BaseException) -> None:
    """A line on standard error, which is the daemon's log, about what nobody foresaw."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    trail = " < ".join(f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames)
    text = f"bpfs worker: {type(error).__name__}: {error} [{trail}]".replace("\n", " | ")
    with contextlib.suppress(OSError, ValueError):  # a log that is full or gone must not end the work that failed
        print(text, file=sys.stderr, flush=True)


def sentence(error: BaseException) -> str:
    """What to tell the user."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return f"{type(error).__name__}: {error}"
