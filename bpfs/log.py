"""Logging: one line a message, to stderr or a file; never more than one line, whatever is in it."""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path


class _OneLine(logging.Formatter):
    """Formats as ``2026-01-31T12:00:00 bpmaster[123] warning nodes: text``."""

    def __init__(self, program: str) -> None:
        super().__init__(f"%(asctime)s {program}[%(process)d] %(lower)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        record.lower = record.levelname.lower()
        info, record.exc_info = record.exc_info, None
        line = super().format(record)
        if info and info[1] is not None:
            error: BaseException = info[1]
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:  # a nursery's: says nothing
                error = error.exceptions[0]
            frames = traceback.extract_tb(error.__traceback__)
            trail = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
            line += f": {type(error).__name__}: {error} [{trail}]"
        return line.replace("\n", " | ").replace("\r", " ")


def start(program: str, file: Path | None = None, verbose: bool = False) -> None:
    """Send the log of this process to a file (appended), or to stderr where there is none."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if file is not None:
        handler = logging.FileHandler(file, errors="backslashreplace")  # a name in a line may be no UTF-8
    handler.setFormatter(_OneLine(program))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)


def get(name: str) -> logging.Logger:
    """The logger of a part of the system: `nodes`, `wire`, `procs`, …"""
    return logging.getLogger(name)
