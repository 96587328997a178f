"""A full disk, or the end of who writes, at any moment of a checkpoint: the last good image stays, and nothing else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from engine import image as img
from engine.checkpoint import Chain, Checkpoint
from tests.engine.moves import Mover, Refused, Victim, until

PAGE = 4096
USER = {"uid": 1234, "gid": 1234}


@contextmanager
def disk(folder: Path) -> Iterator[Callable[[int], None]]:
    """A small disk there; what is yielded gives it so many more free pages, and no others."""
    folder.mkdir()
    for above in folder.parents[:4]:
        above.chmod(above.stat().st_mode | 0o055)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=777", "ck", folder], check=True)

    def leave(free: int) -> None:
        state = os.statvfs(folder)
        pages = (state.f_blocks - state.f_bfree) * state.f_frsize // PAGE + free
        subprocess.run(["mount", "-o", f"remount,size={pages * PAGE}", folder], check=True)

    try:
        yield leave
    finally:
        subprocess.run(["umount", folder], check=True)


class Taking:
    """One checkpoint of a process, step by step, as the daemon has it taken."""

    def __init__(self, mover: Mover, pid: int, path: Path, **more: object) -> None:
        self.source, self.keeper = mover.worker(), mover.worker()
        self.writer: int = self.keeper.ask("hello")["pid"]
        self._pid, self._wanted = pid, {"path": str(path), "address": "127.0.0.1", **USER, **more}

    def run(self, keep: int = 1) -> None:
        """All of it. Raises Refused."""
        self.take()
        self.keeper.ask("keep_done", keep=keep)

    def begin(self) -> dict[str, Any]:
        return self.keeper.ask("keep", **self._wanted)

    def take(self) -> None:
        ready = self.begin()
        self.source.ask("freeze", pid=self._pid, writing=False, inspect=True, digests=True)
        self.keeper.start("keep_image", timeout_s=30)
        try:
            with suppress(Refused):  # the keeper says why
                self.source.ask("send", host="127.0.0.1", port=ready["port"], token=ready["token"])
            self.keeper.finish()
        finally:
            self.source.ask("release")

    def close(self) -> None:
        self.source.close(), self.keeper.close()


def taken(mover: Mover, pid: int, path: Path, keep: int = 1, **more: object) -> None:
    taking = Taking(mover, pid, path, **more)
    try:
        taking.run(keep)
    finally:
        taking.close()


def is_whole(path: Path) -> bool:
    chain = Chain(os.open(path, os.O_RDONLY), lambda name: os.open(path.parent / os.fsdecode(name), os.O_RDONLY))
    try:
        return sum(len(data) for _, data in chain.pages()) == chain.newest.image.total
    finally:
        chain.close()


def assert_alone(folder: Path, good: dict[str, bytes]) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good


@pytest.mark.parametrize("since", ["", "ck"])
def test_a_disk_that_is_full_at_any_moment(
    mover: Mover, victim: Callable[..., Victim], tmp_path: Path, since: str
) -> None:
    one, folder = victim("memory"), tmp_path / "disk"
    with disk(folder) as leave:
        taken(mover, one.pid, folder / "ck")
        good = {"ck": (folder / "ck").read_bytes()}
        size, refused = len(good["ck"]) // PAGE + 2, 0
        for free in [*range(4), *range(4, size, max(1, size // 16)), *range(size - 4, size + 3)]:
            leave(max(free, 1))  # a size of 0 is no limit at all
            try:
                taken(mover, one.pid, folder / "next", since=since)
                (folder / "next").unlink()
            except Refused as refusal:
                assert refusal.errno == 28, refusal
                refused += 1
            assert_alone(folder, good)
        leave(size + 16)
        taken(mover, one.pid, folder / "next", since=since)
        assert refused > 10 and is_whole(folder / "ck") and is_whole(folder / "next")
    one.stop()
    assert one.process.wait() == 0, one.text()


def killed(worker: int) -> None:
    os.kill(worker, signal.SIGKILL)
    stat = Path(f"/proc/{worker}/stat")
    until(lambda: not stat.exists() or " Z " in stat.read_text(), "its end")


def part_of(taking: Taking, ready: dict[str, Any], whole: Path) -> None:
    """Sends an image's pages but the last, and waits until the first are written."""
    known = Checkpoint(os.open(whole, os.O_RDONLY))
    end = known.pages_at + known.image.total - PAGE
    known.close()
    data, free = whole.read_bytes(), os.statvfs(whole).f_bfree
    begin = img.HEADER_SIZE + int.from_bytes(data[8:12], "little")  # after ABOUT
    taking.keeper.start("keep_image", timeout_s=30)
    with socket.create_connection(("127.0.0.1", ready["port"])) as stream:
        stream.sendall(ready["token"] + data[begin:end])
        until(lambda: free - os.statvfs(whole).f_bfree > 100, "some of it to be written")
        killed(taking.writer)


@pytest.mark.parametrize("moment", ["opened", "part", "taken"])
def test_whoever_writes_it_is_killed(mover: Mover, victim: Callable[..., Victim], tmp_path: Path, moment: str) -> None:
    one, folder = victim("memory"), tmp_path / "disk"
    with disk(folder):
        taken(mover, one.pid, folder / "ck")
        good = {"ck": (folder / "ck").read_bytes()}
        taking = Taking(mover, one.pid, folder / "ck")
        if moment == "taken":
            taking.take()
            killed(taking.writer)
        else:
            ready = taking.begin()
            if moment == "part":
                part_of(taking, ready, folder / "ck")
            else:
                killed(taking.writer)
        taking.close()
        assert_alone(folder, good)
        taken(mover, one.pid, folder / "ck")
        assert is_whole(folder / "ck") and os.listdir(folder) == ["ck"]
    one.stop()
    assert one.process.wait() == 0, one.text()


def test_as_many_as_were_asked_for_stay_and_are_their_owners(
    mover: Mover, victim: Callable[..., Victim], tmp_path: Path
) -> None:
    one, folder = victim("memory"), tmp_path / "disk"
    with disk(folder):
        contents: list[bytes] = []
        for count in range(5):
            taken(mover, one.pid, folder / "ck", keep=3)
            contents.insert(0, (folder / "ck").read_bytes())
            names = ["ck", "ck.1", "ck.2"][: count + 1]
            assert_alone(folder, dict(zip(names, contents, strict=False)))
        for path in folder.iterdir():
            found = path.stat()
            assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (1234, 1234, 0o600)
            assert is_whole(path)
    one.stop()
    assert one.process.wait() == 0, one.text()


def test_memory_that_was_never_touched_takes_no_room(
    mover: Mover, victim: Callable[..., Victim], tmp_path: Path
) -> None:
    one, folder = victim("shared"), tmp_path / "disk"  # has terabytes of it
    with disk(folder):
        taken(mover, one.pid, folder / "ck")
        status = Path(f"/proc/{one.pid}/status").read_text()
        resident, mapped = (int(status.split(f"{key}:")[1].split()[0]) << 10 for key in ("VmRSS", "VmSize"))
        assert (folder / "ck").stat().st_size < resident + (1 << 20) and mapped > 1 << 41
    one.stop()
    assert one.process.wait() == 0, one.text()
