# SPDX-License-Identifier: GPL-2.0-or-later
"""Thousands of callers are interrupted and killed at all moments while others go on undisturbed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tree.mounted import DEADLINE, end_child, mounted, wait_until

STORM = Path(__file__).with_name("storm.py")

HEARTBEAT = """
import sys, time
while True:
    with open("pulse") as file: file.read()
    print(flush=True)
    time.sleep(0.005)
"""


@pytest.mark.slow
def test_interrupted_and_killed_callers_harm_nobody(session_folder: Path) -> None:
    with mounted(session_folder) as daemon:
        top = daemon.mountpoint

        def statistics() -> dict[str, int]:
            read: dict[str, int] = ast.literal_eval((top / "inner/statistics").read_text())
            return read

        beats = top.with_suffix(".beats")
        with beats.open("w") as file:
            heart = subprocess.Popen([sys.executable, "-c", HEARTBEAT], cwd=top, stdout=file, text=True)
        storms = [
            subprocess.Popen([sys.executable, "-S", str(STORM), kind, str(count)], cwd=top, text=True)
            for kind, count in [
                ("interrupted_reader", 400),
                ("blocked_reader", 1200),
                ("blocked_writer", 800),
                ("reader", 1200),
            ]
        ]
        try:
            wait_until("the heart beats", lambda: beats.stat().st_size > 10)
            # While the storm goes on the heart beats on: never a stall as long as the deadline of a wait.
            while any(storm.poll() is None for storm in storms):
                before = beats.stat().st_size
                wait_until("the heart beats on", lambda before=before: beats.stat().st_size > before)  # type: ignore[misc]
            assert [storm.wait(DEADLINE) for storm in storms] == [0, 0, 0, 0]
            before = beats.stat().st_size
            wait_until("the heart beats after it", lambda: beats.stat().st_size > before + 10)
        finally:
            for process in [heart, *storms]:
                end_child(process)
            beats.unlink()
        # Nobody is left: the file that is read right now is the only one.
        wait_until("all files are closed", lambda: statistics()["files"] == 1)
        assert statistics()["inodes"] < 200
        assert (top / "pulse").read_text() == f"{daemon.process.pid}\n"
