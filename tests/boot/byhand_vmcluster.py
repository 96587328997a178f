"""mountscripts/vmcluster as somebody types it: up, used, down, up again, and ^C in the midst of it.

For maintainers, and not for CI, for it takes minutes: .venv/bin/python -m pytest -s tests/boot/byhand_vmcluster.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpfs.rundir import RunDir
from tests.cluster.virtual import TOP

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(3600)]

DEADLINE = 900.0
"""Seconds for anything: for what hangs, and no measure of speed."""


class Terminal:
    """One call of vmcluster, in a process group of its own, as a shell has it."""

    def __init__(self, mount: Path, *arguments: str) -> None:
        self.text = ""
        self._process = subprocess.Popen(
            [TOP / "mountscripts/vmcluster", *arguments], env={**os.environ, "BPFS": str(mount)}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print("   ", line, end="", flush=True)
            self.text += line

    def wait_for(self, word: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while word not in self.text:
            assert self._process.poll() is None and time.monotonic() < deadline, f"no {word!r}: {self.text[-1000:]}"
            time.sleep(0.05)

    def interrupt(self) -> None:
        """^C."""
        os.killpg(self._process.pid, signal.SIGINT)

    def end(self) -> int:
        """Its exit code."""
        code = self._process.wait(DEADLINE)
        self._reader.join(10)
        return code


def left_behind(mount: Path) -> list[str]:
    """What of a cluster of machines is still there."""
    found = [path.name for path in Path("/sys/class/net").glob("bpvm*")]
    found += [str(path) for path in (Path("/run/bpfs-vm"), RunDir(str(mount)).path) if path.exists()]
    if f" {mount} " in Path("/proc/self/mountinfo").read_text():
        found.append(f"the mount {mount}")
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "bpfs node " in line or "/run/bpfs-vm" in line or str(mount) in line:
            found.append(line)
    return found


@pytest.fixture
def mount(session_folder: Path) -> Iterator[Path]:
    mount = session_folder / "vm"
    yield mount
    Terminal(mount, "down").end()


def test_up_down_and_interrupts(mount: Path) -> None:
    for word in ("making the images", "power on: 2 machines", "fetching image"):
        up = Terminal(mount, "up", "--nodes", "2")
        up.wait_for(word)
        up.interrupt()
        assert up.end() != 0
        assert left_behind(mount) == [], word
    for turn in range(2):
        up = Terminal(mount, "up", "--nodes", "2")
        assert up.end() == 0, turn
        bpsh = subprocess.run(
            [TOP / "bpfs/bin/bpsh", "-a", "uname", "-n"], env={**os.environ, "BPFS": str(mount)}, cwd="/",
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert sorted(bpsh.stdout.split()) == ["n0", "n1"]
        again = Terminal(mount, "up")
        assert again.end() == 1 and "runs already" in again.text
        console = Terminal(mount, "console", "1")
        assert console.end() == 0 and "starting bpslave, node 1" in console.text
        assert Terminal(mount, "down").end() == 0
        assert left_behind(mount) == []
    down = Terminal(mount, "down")
    assert down.end() == 1 and "no cluster of machines runs" in down.text
