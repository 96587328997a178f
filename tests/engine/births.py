"""Real programs in a job namespace, born under their placeholders and let loose, without an image."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from engine.jobspace import JobSpace, Report
from engine.linux import ptrace
from engine.placeholders import placing
from engine.runner import Calls
from engine.spawn import spawn_child

T = TypeVar("T")
PATIENCE_S = 60.0  # nothing here takes a second; the machine may be busy with anything
VICTIMS = Path(__file__).parent.parent / "victims"


def until(what: str, found: Callable[[], T]) -> T:
    """Poll until `found` returns something true, and return that."""
    deadline = time.monotonic() + PATIENCE_S
    while not (result := found()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)
    return result


def bear(space: JobSpace, pid: int, ppid: int, pgid: int, sid: int, arguments: list[str], uid: int = 0) -> int:
    """Start a program with these ids; returns its host pid."""
    with placing(space.init, pid, ppid, pgid, sid, uid) as place:
        child = spawn_child(place.maker, pid, place.sibling)
        calls = Calls(child.injection)
        if place.setsid:
            calls.add("setsid")
        if place.pgid is not None:
            calls.add("setpgid", 0, place.pgid)
        calls.run()
    calls = Calls(child.injection)
    strings = [calls.data(os.fsencode(word) + b"\0") for word in arguments]
    vector = calls.data(b"".join(at.to_bytes(8, "little") for at in [*strings, 0]))
    calls.add("getpid")
    calls.run()
    child.injection.trap = 0  # to be stopped as it returns: the new program has not the code that would stop it
    child.injection.call("execve", strings[0], vector, 0, subject=arguments[0])
    ptrace.set_mask(child.pid, 0)
    ptrace.detach(child.pid)
    child.close()
    return child.pid


def victim(space: JobSpace, folder: Path, pid: int, ppid: int, pgid: int, sid: int, *more: str) -> dict[str, int]:
    """Start tests/victims/ids.py; returns the ids that it sees."""
    file = folder / f"ids-{pid}"
    bear(space, pid, ppid, pgid, sid, [sys.executable, str(VICTIMS / "ids.py"), str(file), *more])
    until(f"process {pid} to tell its ids", file.exists)
    result: dict[str, int] = json.loads(file.read_text())
    file.unlink()
    return result


class Reports:
    """Collects the reports of a job space."""

    def __init__(self, space: JobSpace) -> None:
        self.space = space
        self.seen: list[Report] = []

    def wait(self, what: str, wanted: Callable[[Report], bool]) -> Report:
        """The first report, of those that came and those to come, that fits."""

        def look() -> Report | None:
            self.seen += self.space.read_reports()
            return next((report for report in self.seen if wanted(report)), None)

        return until(what, look)  # type: ignore[return-value]
