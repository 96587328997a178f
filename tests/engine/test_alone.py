"""`python -m engine`: the engine without a cluster, its images as files."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.virtual import TOP
from tests.engine.moves import Victim

USAGE = 2


def engine(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=TOP)


def said(*words: object) -> str:
    done = engine(*words)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def refused(*words: object) -> str:
    """The one line that it says instead."""
    done = engine(*words)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout, done
    return done.stderr


@pytest.mark.parametrize("name", ["memory", "memory-fixed", "threads 5", "signals", "inherit"])
def test_an_image_is_brought_up_again(victim: Callable[..., Victim], tmp_path: Path, name: str) -> None:
    program, *arguments = name.split()
    one, file = victim(program, *arguments), tmp_path / "image"
    said("dump", one.pid, "-o", file, "--kill")
    assert one.process.wait() == -signal.SIGKILL
    lines = said("info", file).splitlines()
    assert lines[:2] == [f"pid {one.pid}", f"comm {program}"] and lines[2].endswith(f"/{program}")
    one.stop()
    said("restore", file)


def test_what_was_dumped_runs_on(victim: Callable[..., Victim], tmp_path: Path) -> None:
    one = victim("threads", "3")
    said("dump", one.pid, "-o", tmp_path / "image")
    assert "threads 4" in said("info", tmp_path / "image").splitlines()
    one.stop()
    assert one.process.wait() == 0, one.text()


def test_what_cannot_be_dumped_is_named_and_runs_on(victim: Callable[..., Victim], tmp_path: Path) -> None:
    one = victim("obstacle", "several")
    done = engine("dump", one.pid, "-o", tmp_path / "image")
    assert done.returncode == 1 and "living children" in done.stderr and "System V" in done.stderr
    assert not (tmp_path / "image").exists()
    one.stop()
    assert one.process.wait() == 0, one.text()


def test_a_restored_process_ends_as_it_ends(victim: Callable[..., Victim], tmp_path: Path) -> None:
    one, file = victim("memory"), tmp_path / "image"
    said("dump", one.pid, "-o", file)
    (tmp_path / "output").write_text("")
    with (
        open("/dev/null") as null,
        subprocess.Popen(
            [sys.executable, "-m", "engine", "restore", str(file)], cwd=TOP, stdin=null, stdout=null, stderr=null
        ) as other,
    ):
        one.stop()  # both check what they have
        assert other.wait(100) == 0
    assert one.process.wait() == 0, one.text()


def test_bad_images_and_orders_are_one_line(victim: Callable[..., Victim], tmp_path: Path) -> None:
    one, file = victim("signals"), tmp_path / "image"
    said("dump", one.pid, "-o", file, "--kill")
    one.process.wait()
    whole = file.read_bytes()
    assert "No such file" in refused("info", tmp_path / "none")
    assert "has ended" in refused("dump", one.pid, "-o", tmp_path / "other")
    assert engine("dump").returncode == USAGE
    for at in (0, 1, 40, len(whole) // 2):
        file.write_bytes(whole[:at])
        refused("restore", file)
    for at in (3, 30, 900):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused("restore", file)
        refused("info", file)
    file.write_bytes(whole)
    one.stop()
    said("restore", file)
