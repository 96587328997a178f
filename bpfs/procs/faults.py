"""Places where a test can hold a migration still, to break something at exactly that phase: engine/faults.py."""

from __future__ import annotations

import trio

from engine import faults


def is_held(phase: str) -> bool:
    """Whether a test wants this phase to last."""
    return faults.gate(phase) is not None


async def hold(phase: str) -> None:
    """Waits while a test wants this phase to last."""
    path = faults.gate(phase)
    if path is not None:
        path.with_suffix(".reached").touch()
        while path.exists():
            await trio.sleep(0.005)
