"""What a booting node tells whoever looks at its screen or serial line: one line a step."""

from __future__ import annotations

import os
import time


def say(text: str) -> None:
    """One line, with the seconds since the kernel started."""
    line = f"[{time.clock_gettime(time.CLOCK_BOOTTIME):8.2f}] bpfs: {text}\n"
    try:
        os.write(2, line.encode(errors="replace"))
    except OSError:
        pass  # a console that is gone must not end a node
