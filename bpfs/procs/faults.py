"""Places where a test can hold a migration still, to break something at exactly that phase.

`BPFS_HOLD=DIR` in the environment of bpmaster: a migration that reaches phase P waits as long as the file DIR/P exists,
and tells that it waits by DIR/P.reached. Without the variable nothing is looked at.
"""

from __future__ import annotations

import os
from pathlib import Path

import trio

_DIRECTORY = os.environ.get("BPFS_HOLD")


def is_held(phase: str) -> bool:
    """Whether a test wants this phase to last."""
    return _DIRECTORY is not None and (Path(_DIRECTORY) / phase).exists()


async def hold(phase: str) -> None:
    """Waits while a test wants this phase to last."""
    if _DIRECTORY is None:
        return
    gate = Path(_DIRECTORY) / phase
    if gate.exists():
        gate.with_suffix(".reached").touch()
        while gate.exists():
            await trio.sleep(0.005)
