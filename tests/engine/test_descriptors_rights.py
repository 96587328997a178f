"""Paths that lead elsewhere, rights that were lost, other roots, and coming home to a ghost."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.descriptors import Descriptors, close_all, inspect, rebuild
from engine.jobspace import JobSpace
from engine.linux.credentials import Credentials, acting_as
from tests.engine.births import Reports, bear
from tests.engine.test_descriptors import KINDS, ROOT, SCRIPT, own, python

USER = Credentials(1234, 1234, (), 0)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that ordinary users get through to."""
    for parent in [tmp_path, *tmp_path.parents[:3]]:
        parent.chmod(parent.stat().st_mode | 0o755)
    tmp_path.chmod(0o777)
    return tmp_path


def opened(folder: Path, flags: str = "os.O_RDWR | os.O_CREAT, 0o600") -> Any:
    return python(f"move(os.open('file', {flags})); os.write(10, b'secret')", cwd=folder, stdin=subprocess.DEVNULL)


def build(table: list[dict[str, Any]], credentials: Credentials = ROOT, root: int = 0) -> int:
    placed = rebuild(table, {}, root or os.getpid(), credentials, os.getpid())
    assert [one.target_fd for one in placed] == [10]
    return placed[0].local_fd


def elsewhere(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table as it comes from another machine, where inode numbers mean nothing."""
    return [{**entry, "boot": b"another"} for entry in table]


def test_what_a_process_may_not_open_any_more_stays_open(folder: Path) -> None:
    with opened(folder) as pid:
        fd = build(own(inspect(pid)), USER)
        assert os.pread(fd, 10, 0) == b"secret"
        os.close(fd)


def test_another_object_is_opened_with_the_process_s_own_rights(folder: Path) -> None:
    with opened(folder) as pid:
        table = own(inspect(pid))
        with pytest.raises(PermissionError, match=r"fd 10 \(.*/file: Permission denied\)"):
            build(elsewhere(table), USER)
        (folder / "file").unlink()
        (folder / "file").write_text("another")
        (folder / "file").chmod(0o600)
        with pytest.raises(PermissionError):
            build(table, USER)
        (folder / "file").chmod(0o666)
        fd = build(table, USER)
        assert os.pread(fd, 10, 0) == b"another"
        os.close(fd)


def test_only_the_opened_access_is_asked_for(folder: Path) -> None:
    (folder / "file").write_text("x")
    (folder / "file").chmod(0o644)
    with python("move(os.open('file', os.O_RDONLY))", cwd=folder, stdin=subprocess.DEVNULL) as pid:
        os.close(build(elsewhere(own(inspect(pid))), USER))


def test_groups_and_capabilities_count(folder: Path) -> None:
    with opened(folder) as pid:
        table = elsewhere(own(inspect(pid)))
        os.chown(folder / "file", 0, 4321)
        (folder / "file").chmod(0o660)
        with pytest.raises(PermissionError):
            build(table, USER)
        os.close(build(table, Credentials(1234, 1234, (4321,), 0)))
        os.chown(folder / "file", 99, 99)
        os.close(build(table, ROOT))
        with pytest.raises(PermissionError):
            build(table, Credentials(0, 0, (), 0))  # a root without capabilities
        os.close(build(table, ROOT))


def test_symbolic_link_in_the_path_gives_nothing(folder: Path) -> None:
    secret = folder / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    with opened(folder) as pid:
        table = own(inspect(pid))
        (folder / "file").unlink()
        (folder / "file").symlink_to(secret)
        with pytest.raises(PermissionError):
            build(table, USER)


def test_fifo_in_the_place_of_a_file_does_not_make_us_wait(folder: Path) -> None:
    with opened(folder) as pid:
        table = own(inspect(pid))
        (folder / "file").unlink()
        os.mkfifo(folder / "file", 0o666)
        with pytest.raises(OSError, match="something else has this path") as caught:
            build(table, USER)
        assert caught.value.errno == errno.ESTALE


def test_missing_file_is_named(folder: Path) -> None:
    with opened(folder) as pid:
        table = own(inspect(pid))
        (folder / "file").unlink()
        with pytest.raises(FileNotFoundError, match=r"fd 10 \(.*/file: No such file"):
            build(table)


def test_what_was_made_before_an_error_is_closed(folder: Path) -> None:
    code = "a, b = os.pipe(); os.dup2(a, 5); os.write(b, b'x'); move(os.open('file', os.O_CREAT))"
    with python(code, cwd=folder, stdin=subprocess.DEVNULL) as pid:
        table = own(inspect(pid))
        (folder / "file").unlink()
        for _ in range(3):
            with pytest.raises(FileNotFoundError):
                rebuild(table, {}, os.getpid(), ROOT, os.getpid())


def test_paths_mean_the_jobs_root(folder: Path) -> None:
    # A root of its own, with an absolute link that must stay inside.
    code = (
        "import os, signal, sys\n"
        "os.chroot(sys.argv[1]); os.chdir('/'); os.kill(os.getpid(), signal.SIGSTOP)"
    )  # fmt: skip
    inside = folder / "root"
    (inside / "real").mkdir(parents=True)
    (inside / "real" / "file").write_text("inside")
    (folder / "file").write_text("outside")
    with opened(folder) as pid:
        (entry,) = elsewhere(own(inspect(pid)))
    entry["path"] = b"/link/file"
    (inside / "link").symlink_to("/real")
    with subprocess.Popen([sys.executable, "-c", code, str(inside)]) as chrooted:
        try:
            os.waitpid(chrooted.pid, os.WUNTRACED)
            fd = build([entry], root=chrooted.pid)
            assert os.pread(fd, 10, 0) == b"inside"
            os.close(fd)
        finally:
            chrooted.kill()


def test_a_process_in_a_chroot_keeps_its_files(folder: Path) -> None:
    (folder / "file").write_text("x")
    code = "os.chroot('.'); move(os.open('/file', os.O_RDONLY))"
    with python(code, cwd=folder, stdin=subprocess.DEVNULL) as pid:
        found = inspect(pid)
        assert found.refusals == []
        os.close(build(own(found)))


def test_files_of_a_job_namespace(folder: Path) -> None:
    space = JobSpace.start(range(100000, 110000))
    try:
        with opened(folder) as pid:
            fd = build(own(inspect(pid)), USER, space.init)
            assert os.pread(fd, 10, 0) == b"secret"
            os.close(fd)
    finally:
        space.close()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "locks"])
def test_inspecting_inside_a_job_namespace(kind: str, folder: Path) -> None:
    space = JobSpace.start(range(100000, 110000))
    try:
        reports = Reports(space)
        hostpid = bear(space, 5000, 4000, 5000, 4000, [sys.executable, str(SCRIPT), kind, str(folder)])
        reports.wait("the victim to stop", lambda report: report.code == os.CLD_STOPPED)
        found = inspect(hostpid)
        assert found.refusals == [] and found.externals == []
        paths = [entry["path"] for entry in found.table if entry["kind"] == "file"]
        assert all(path.startswith(os.fsencode(folder)) for path in paths)
        placed = rebuild(own(found), {}, space.init, ROOT, hostpid)
        space.signal(5000, signal.SIGCONT)
        assert reports.wait("the end", lambda report: report.code == os.CLD_EXITED).status == 0
        close_all(placed)
    finally:
        space.close()


def test_acting_as_gives_everything_back() -> None:
    before = Path("/proc/self/status").read_text().split("\nThreads")[0].split("Uid:")[1]
    capabilities = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Cap")]
    with pytest.raises(ZeroDivisionError), acting_as(Credentials(1234, 4321, (5, 6), 0b10)):
        status = Path("/proc/self/status").read_text()
        assert "Uid:\t0\t0\t0\t1234\n" in status and "Gid:\t0\t0\t0\t4321\n" in status and "Groups:\t5 6" in status
        raise ZeroDivisionError
    assert Path("/proc/self/status").read_text().split("\nThreads")[0].split("Uid:")[1] == before
    assert [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Cap")
    ] == capabilities


# ---- coming home ---------------------------------------------------------------------------------------------------


def offset(pid: int, fd: int) -> int:
    return int(Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split()[1])


def home(found: Descriptors, ghost: int, numbers: dict[int, int]) -> dict[int, int]:
    placed = rebuild(found.table, {}, ghost, ROOT, ghost, ghost=numbers)
    return {one.target_fd: one.local_fd for one in placed}


def test_the_ghost_s_own_descriptions_are_taken_over(folder: Path) -> None:
    code = "move(os.open('file', os.O_RDWR | os.O_CREAT)); os.write(10, b'0123456789'); r, w = os.pipe()"
    with python(code, cwd=folder, stdin=subprocess.DEVNULL) as ghost:
        found = inspect(ghost)
        found.table = own(found)
        found.table[0 if found.table[0]["kind"] == "file" else -1]["pos"] = 4
        local = home(found, ghost, {})
        # One offset for both: it is the same open file description.
        assert offset(ghost, 10) == 4
        os.lseek(local[10], 7, os.SEEK_SET)
        assert offset(ghost, 10) == 7
        # The pipe inside the process is made afresh.
        assert os.fstat(local[3]).st_ino != os.stat(f"/proc/{ghost}/fd/3").st_ino
        for fd in local.values():
            os.close(fd)


def test_other_files_and_accesses_are_opened_afresh_at_home(folder: Path) -> None:
    code = "move(os.open('file', os.O_RDWR | os.O_CREAT)); os.write(10, b'0123456789')"
    with python(code, cwd=folder, stdin=subprocess.DEVNULL) as ghost:
        found = inspect(ghost)
        found.table = own(found)
        found.table[0] |= {"flags": os.O_RDONLY, "pos": 2}
        local = home(found, ghost, {})
        assert offset(ghost, 10) == 10 and os.read(local[10], 3) == b"234"
        os.close(local[10])


def test_externals_come_from_the_ghost() -> None:
    out, into = os.pipe()
    with python("os.dup2(1, 10)", stdin=subprocess.DEVNULL, stdout=into) as ghost:
        os.close(into)
        found = inspect(ghost)
        found.table = [entry for entry in found.table if entry["kind"] == "external" and 1 in entry["fds"][0]]
        assert found.table[0]["fds"] == [[1, False], [10, False]]
        # On the node it became descriptors 20 and 21; the ghost knows the channel by its number 10.
        found.table[0] |= {"key": 20, "fds": [[20, False], [21, True]]}
        local = home(found, ghost, {20: 10})
        assert local[20] == local[21] and os.fstat(local[20]).st_ino == os.fstat(out).st_ino
        os.close(local[20])
        with pytest.raises(OSError, match="the ghost has no descriptor 20 to give back"):
            home(found, ghost, {})
        found.table[0] |= {"key": 1, "fds": [[1, False]]}
        local = home(found, ghost, {})
        os.write(local[1], b"home")
        assert os.read(out, 10) == b"home"
        os.close(local[1])
    os.close(out)


def test_a_running_source_is_no_danger(folder: Path) -> None:
    # It should be stopped; if it is not, inspecting fails or succeeds, but harms nobody.
    code = "import os\nwhile True:\n    for f in [os.open('/dev/null', 0) for _ in range(9)]: os.close(f)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        for _ in range(50):
            try:
                inspect(process.pid)
            except OSError:
                continue
        process.send_signal(signal.SIGKILL)
