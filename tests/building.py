"""What the tests compile."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

VICTIMS = Path(__file__).parent / "victims"


def build_victims() -> Path:
    """The folder of the compiled victims. Tests may run in several processes: one of them compiles."""
    with (VICTIMS / "Makefile").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["make", "-s", "-C", str(VICTIMS)], check=True)
    return VICTIMS / "bin"
