"""The program that bpfs-init keeps running: phase 1 or phase 2, as the image says."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from boot.errors import BootError
from boot.node import phase1, phase2
from boot.node.console import say

PHASE = Path("/etc/beowulf/phase")

FIRST_PAUSE, LAST_PAUSE = 1.0, 30.0
"""Seconds before a node starts over after a failure: doubling from the first to the last, each by chance 0.5 to 1.5
times."""


def main() -> None:
    """Try until the phase hands over to the next program; that never returns."""
    os.set_inheritable(2, True)
    phase = {"1": phase1.run, "2": phase2.run}[PHASE.read_text().strip()]
    pause = FIRST_PAUSE
    while True:
        try:
            phase()
        except (BootError, OSError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            say(f"FAILED: {reason}")
        wait = pause * random.uniform(0.5, 1.5)
        say(f"starting over in {wait:.1f} s")
        time.sleep(wait)
        pause = min(2 * pause, LAST_PAUSE)


if __name__ == "__main__":
    main()
