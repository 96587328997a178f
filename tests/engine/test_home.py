"""Away and home again: a ghost takes the process's place and becomes the process again."""

import os
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.ghosting import grant_rights
from tests.engine.moves import Mover, Refused, Victim, socket_pair, until


def ghost_program(programs: Path) -> int:
    return os.open(programs / "ghost", os.O_PATH | os.O_CLOEXEC)


def go_away(mover: Mover, one: Victim, program: int):  # type: ignore[no-untyped-def]
    ours, theirs = socket_pair()
    ours.settimeout(60)
    with theirs:
        hostpid = mover.away(one.pid, one.output.fileno(), "become_ghost", fds=[program, theirs.fileno()])
    assert ours.recv(64) == b"ghost"
    return ours, hostpid


def test_ghost_has_the_pid_and_command_line(mover: Mover, victim: Callable[..., Victim], programs: Path) -> None:
    one = victim("memory")
    cmdline = Path(f"/proc/{one.pid}/cmdline").read_bytes()
    program = ghost_program(programs)
    control, _ = go_away(mover, one, program)
    control.send(b"?")
    assert struct.unpack("ii", control.recv(64)) == (one.pid, os.getpid())
    assert Path(f"/proc/{one.pid}/cmdline").read_bytes() == cmdline
    assert os.readlink(f"/proc/{one.pid}/exe").endswith("/ghost")
    control.close()
    assert one.process.wait() == 77
    os.close(program)


@pytest.mark.parametrize("name", ["memory", "signals", "memory-static", "robust"])
def test_there_and_back(mover: Mover, victim: Callable[..., Victim], programs: Path, name: str) -> None:
    one = victim(name)
    exe = os.readlink(f"/proc/{one.pid}/exe")
    program = ghost_program(programs)
    for _ in range(3):
        control, hostpid = go_away(mover, one, program)
        assert mover.home(hostpid, one.pid) == one.pid
        assert control.recv(64) == b""  # closed at the commit
        control.close()
        assert os.readlink(f"/proc/{one.pid}/exe") == exe
    one.stop()
    assert one.process.wait() == 0, one.text()
    os.close(program)


@pytest.mark.parametrize("who", ["root", "user"])
def test_rights_come_home(
    mover: Mover, victim: Callable[..., Victim], programs: Path, tmp_path: Path, who: str
) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o777)
    # With "no new privileges", as the victim sets it otherwise, the ghost would be granted nothing.
    one = victim("state", who, "grants")
    copy = shutil.copy(programs / "ghost", tmp_path / "ghost-with-rights")
    grant_rights(copy)
    program = os.open(copy, os.O_PATH | os.O_CLOEXEC)
    for _ in range(2):
        control, hostpid = go_away(mover, one, program)
        mover.home(hostpid, one.pid)
        control.close()
    one.stop()
    assert one.process.wait() == 0, one.text()
    os.close(program)


def test_failed_home_coming_leaves_a_ghost(mover: Mover, victim: Callable[..., Victim], programs: Path) -> None:
    one = victim("memory")
    program = ghost_program(programs)
    control, hostpid = go_away(mover, one, program)
    source, destination = mover.worker(), mover.worker()
    source.ask("freeze", pid=hostpid, writing=False)
    seen = source.ask("inspect")
    mover._transfer(source, destination, seen, {"ghost": one.pid}, {}, [])
    destination.close()  # held, but never resumed
    assert control.recv(64) == b"ghost"
    source.ask("release")
    control.send(b"?")
    assert struct.unpack("ii", control.recv(64)) == (one.pid, os.getpid())
    assert mover.home(hostpid, one.pid) == one.pid
    one.stop()
    assert one.process.wait() == 0, one.text()
    os.close(program)
    control.close()


def test_a_ghost_program_that_cannot_run_leaves_the_process_as_it_was(
    mover: Mover, victim: Callable[..., Victim], tmp_path: Path
) -> None:
    one = victim("memory")

    def held() -> tuple[dict[str, str], int]:
        folder = Path(f"/proc/{one.pid}/fdinfo")
        return {file.name: file.read_text() for file in folder.iterdir()}, os.stat(folder).st_uid

    before = held()
    (tmp_path / "no-program").write_text("")
    program = os.open(tmp_path / "no-program", os.O_PATH | os.O_CLOEXEC)
    source = mover.worker()
    source.ask("freeze", pid=one.pid, writing=False)
    source.ask("inspect")
    ours, theirs = socket_pair()
    with ours, theirs, pytest.raises(Refused, match="running the ghost"):
        source.ask("become_ghost", [program, theirs.fileno()], env=[])
    source.ask("release")
    assert held() == before
    one.stop()
    assert one.process.wait() == 0, one.text()
    os.close(program)


def test_killed_ghost_ends_as_killed(mover: Mover, victim: Callable[..., Victim], programs: Path) -> None:
    one = victim("memory")
    program = ghost_program(programs)
    control, _ = go_away(mover, one, program)
    os.kill(one.pid, signal.SIGKILL)
    assert one.process.wait() == -signal.SIGKILL
    until(lambda: control.recv(64) == b"", "the end of the control socket")
    control.close()
    os.close(program)
