# SPDX-License-Identifier: GPL-2.0-or-later
"""Thousands of callers are interrupted and killed at all moments while others go on undisturbed."""

from __future__ import annotations

import ast
import os
import signal
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


def grows(path: Path, size: int) -> bool:
    return path.stat().st_size > size


def beats_past(heart: Path, count: int) -> bool:
    return int(heart.read_text()) > count


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "share"), [([], 1), (["remote"], 3)], ids=["local", "remote"])
def test_interrupted_and_killed_callers_harm_nobody(session_folder: Path, kind: list[str], share: int) -> None:
    with mounted(session_folder, "daemon", *kind) as daemon:
        top = daemon.mountpoint

        def statistics() -> dict[str, int]:
            read: dict[str, int] = ast.literal_eval((top / "inner/statistics").read_text())
            return read

        beats = top.with_suffix(".beats")
        with beats.open("w") as file:
            heart = subprocess.Popen([sys.executable, "-c", HEARTBEAT], cwd=top, stdout=file, text=True)
        storms = [
            subprocess.Popen([sys.executable, "-S", str(STORM), way, str(count // share)], cwd=top, text=True)
            for way, count in [
                ("interrupted_reader", 200),
                ("blocked_reader", 800),
                ("blocked_writer", 600),
                ("reader", 800),
            ]
        ]
        try:
            wait_until("the heart beats", lambda: beats.stat().st_size > 10)
            # While the storm goes on the heart beats on: never a stall as long as the deadline of a wait.
            while any(storm.poll() is None for storm in storms):
                before = beats.stat().st_size
                wait_until("the heart beats on", grows, beats, before)
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


def test_vanished_requests_do_not_stop_the_loop(session_folder: Path) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    with mounted(session_folder) as daemon:
        heart = Path(f"{daemon.mountpoint}.heart")
        fd = os.open(daemon.mountpoint / "inner/kick", os.O_WRONLY)
        try:
            for _ in range(100):
                os.write(fd, b"now")
                # Nobody touches the mount now; only the daemon itself can beat.
                wait_until("the daemon's heart beats", beats_past, heart, int(heart.read_text()) + 2)
        finally:
            os.close(fd)
            signal.signal(signal.SIGUSR1, before)
