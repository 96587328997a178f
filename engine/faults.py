"""A place where a test can hold a worker still, to kill it at exactly that moment (bpfs/procs/faults.py: a migration).

`BPFS_HOLD=DIR` in the environment: who comes to a phase P waits as long as the file DIR/P exists, and tells that it
waits by DIR/P.reached. Without the variable nothing is looked at.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_DIRECTORY = os.environ.get("BPFS_HOLD")


def gate(phase: str) -> Path | None:
    """The file that a test keeps there as long as this phase is to last; None: nobody wants it to."""
    path = Path(_DIRECTORY) / phase if _DIRECTORY is not None else None
    return path if path is not None and path.exists() else None


def is_waited_for(phase: str) -> bool:
    """Whether a test wants this phase to last, for who cannot stand still in it; tells that it is there."""
    path = gate(phase)
    if path is not None:
        path.with_suffix(".reached").touch()
    return path is not None


def hold(phase: str) -> None:
    """Wait while a test wants this phase to last."""
    path = gate(phase)
    if path is not None:
        path.with_suffix(".reached").touch()
        while path.exists():
            time.sleep(0.005)
