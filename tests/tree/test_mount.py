# SPDX-License-Identifier: GPL-2.0-or-later
"""A mounted tree as programs see it: cat, echo, ls and shells on a real mount."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpfs.tree.callers import job_process_of
from tests.tree.mounted import DEADLINE, Daemon, end_child, is_mounted, mounted, run, wait_until, waits_in_kernel

READ = 0  # system-call number of x86-64, asm/unistd_64.h


KINDS = {"local": (), "remote": ("remote",)}
"""The master's mount, and that of a node: programs must not see any difference."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def daemon(session_folder: Path, kind: tuple[str, ...]) -> Iterator[Daemon]:
    with mounted(session_folder, "daemon", *kind) as running:
        yield running


@pytest.fixture
def top(daemon: Daemon) -> Path:
    return daemon.mountpoint


def spawn(*command: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def write_at_once(path: Path, data: bytes, flags: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def reads(path: Path, text: str) -> bool:
    return path.read_text() == text


def control(top: Path, verb: str) -> None:
    write_at_once(top / "inner/control", verb.encode())


# -- reading -------------------------------------------------------------------------------------------------


def test_listing_shows_types_modes_and_owners(top: Path) -> None:
    listing = run("ls -ln . inner boxes boxes/0", cwd=top)
    assert listing.returncode == 0, listing.stderr
    shown = {line.split()[-1]: line.split()[0] for line in listing.stdout.splitlines() if len(line.split()) > 8}
    assert shown["events"] == "-r--r--r--"
    assert shown["value"] == "-rw-r--r--"
    assert shown["secret"] == "-r--------"
    assert shown["fail"] == "--w--w--w-"
    assert shown["inner"] == "dr-xr-xr-x"
    assert "self -> boxes/0" in listing.stdout


def test_cat_reads_whole_files(top: Path) -> None:
    assert (
        run("cat inner/large | md5sum", cwd=top).stdout
        == run("for i in $(seq 19200); do echo 0123456789abcde; done | md5sum").stdout
    )
    assert run("tail -n 1 inner/large; head -c 5 inner/large", cwd=top).stdout == "0123456789abcde\n01234"
    assert run("wc -l < inner/large", cwd=top).stdout == "19200\n"
    assert run("cat self/value", cwd=top).stdout == run("cat boxes/0/value", cwd=top).stdout


def test_read_at_an_offset(top: Path) -> None:
    fd = os.open(top / "inner/large", os.O_RDONLY)
    try:
        assert os.pread(fd, 6, 16 * 1000 + 10) == b"abcde\n"
        assert os.pread(fd, 10, 1 << 20) == b""
    finally:
        os.close(fd)


def test_verbs_are_listed(top: Path) -> None:
    assert "say WORD...   keeps the words" in (top / "inner/control").read_text()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat nothing", "No such file or directory"),
        ("cat boxes/7/value", "No such file or directory"),
        ("cat boxes/00/value", "No such file or directory"),
        ("cat inner/pulse/x", "No such file or directory"),
        ("cat pulse/x", "Not a directory"),
        ("mkdir boxes/9", "Operation not permitted"),
        ("touch boxes/9", "Operation not permitted"),
        ("rm pulse", "Operation not permitted"),
        ("ln -s a b", "Operation not permitted"),
        ("mv pulse inner", "Operation not permitted"),
        ("chmod 600 pulse", "Operation not permitted"),
    ],
)
def test_what_is_refused_says_why(top: Path, command: str, message: str) -> None:
    got = run(command, cwd=top)
    assert got.returncode != 0
    assert message in got.stderr


# -- writing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_shells_write_in_all_their_ways(top: Path, shell: str) -> None:
    ways = ["echo 12 > F", "printf 13 > F", "echo -n 14 >> F", "printf '  15  \\n' > F", "echo 16 | tee F >/dev/null",
            "exec 3>F; echo 17 >&3", "echo 18 | dd of=F status=none", "echo -7 1<> F"]  # fmt: skip
    for way, expected in zip(ways, [12, 13, 14, 15, 16, 17, 18, -7], strict=True):
        got = run(way.replace("F", "boxes/1/value"), shell, cwd=top)
        assert (got.returncode, got.stderr) == (0, ""), way
        assert (top / "boxes/1/value").read_text() == f"{expected}\n", way


@pytest.mark.parametrize(
    "data",
    [b"banana\n", b"\n", b"   \n", b"1\n2\n", b"1\r2", b"9" * 30, b"2147483648", b"0x10", b"1_0", b"\xff\n", b"1\0",
     "\u0661".encode(), b"1" * 4097, b"7\n" * (1 << 19)],
    ids=lambda data: repr(data[:12]),
)  # fmt: skip
def test_nonsense_is_invalid(top: Path, data: bytes) -> None:
    before = (top / "boxes/2/value").read_text()
    with pytest.raises(OSError) as caught:
        write_at_once(top / "boxes/2/value", data)
    assert caught.value.errno == errno.EINVAL
    assert (top / "boxes/2/value").read_text() == before


def test_truncation_alone_changes_nothing(top: Path) -> None:
    before = (top / "boxes/2/value").read_text()
    assert run(": > boxes/2/value", cwd=top).returncode == 0
    assert (top / "boxes/2/value").read_text() == before


@pytest.mark.parametrize("name", ["ESRCH", "ENOENT", "EHOSTDOWN", "EACCES", "EBUSY", "EOPNOTSUPP", "ETIMEDOUT"])
@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_errno_reaches_the_shell(top: Path, shell: str, name: str) -> None:
    got = run(f"echo {name} > inner/fail", shell, cwd=top)
    assert got.returncode != 0
    # bash tells the errno; dash says "I/O error" for every failed write of echo.
    assert (os.strerror(getattr(errno, name)) if shell == "bash" else "I/O error") in got.stderr


def test_an_error_in_a_handler_is_eio_and_harms_nobody(session_folder: Path, kind: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError, match="Traceback"), mounted(session_folder, "daemon", *kind) as own:
        with pytest.raises(OSError) as caught:
            control(own.mountpoint, "crash")
        assert caught.value.errno == errno.EIO
        assert (own.mountpoint / "pulse").read_text() == f"{own.process.pid}\n"


# -- who calls -----------------------------------------------------------------------------------------------


def test_writer_is_known_by_pid_and_uid(top: Path) -> None:
    got = run('echo "say hello you" > inner/control; cat inner/last; echo $$', cwd=top, uid=12345)
    said, pid = got.stdout.splitlines()
    assert said == f"hello you uid=12345 gid=12345 pid={pid}"


def test_writer_on_an_inherited_descriptor_is_the_writer(top: Path) -> None:
    # Opened by one shell, written by its child: the child is who waits, and who would be moved.
    got = run('exec 3> inner/control; (echo "say x" >&3; echo $BASHPID); cat inner/last', cwd=top)
    pid, said = got.stdout.splitlines()
    assert said.endswith(f"pid={pid}")


def test_writing_thread_is_known_by_its_process(top: Path) -> None:
    program = """
import os, threading
fd = os.open("inner/control", os.O_WRONLY)
thread = threading.Thread(target=os.write, args=(fd, b"say x"))
thread.start(); thread.join(); print(os.getpid())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=top, capture_output=True, text=True, timeout=DEADLINE)
    assert (top / "inner/last").read_text().strip().endswith(f"pid={done.stdout.strip()}")


# -- modes and freshness -------------------------------------------------------------------------------------


def test_kernel_judges_modes(top: Path) -> None:
    assert "Permission denied" in run("cat inner/secret", cwd=top, uid=12345).stderr
    assert run("cat inner/secret", cwd=top).stdout == "root only\n"
    assert "Permission denied" in run("echo 1 > boxes/0/value", cwd=top, uid=12345).stderr


def test_attributes_change_with_the_object(top: Path) -> None:
    box = top / "boxes/0"
    for mode in [0o711, 0o755, 0o750, 0o711] * 25:
        write_at_once(box / "mode", f"{mode:o}".encode())
        assert stat.S_IMODE(box.stat().st_mode) == mode
        assert stat.S_IMODE((box / "guarded").stat().st_mode) == 0o444 | (mode & 0o111) << 1
    assert run("chown 12345:54321 boxes/0 && chmod 700 boxes/0", cwd=top).stderr == ""
    assert run("stat -c '%u %g %a' boxes/0", cwd=top).stdout == "12345 54321 700\n"
    assert run("echo x > boxes/0/guarded", cwd=top, uid=12345).returncode == 0
    assert "Permission denied" in run("echo x > boxes/0/guarded", cwd=top, uid=12346).stderr
    assert "Operation not permitted" in run("chmod 777 boxes/0", cwd=top, uid=12346).stderr
    assert run("chmod 755 boxes/0", cwd=top, uid=12345).stderr == ""
    assert run("chown 0:0 boxes/0", cwd=top).stderr == ""
    assert run("echo x > boxes/0/guarded; cat boxes/0/mode", cwd=top, uid=12346).stdout == "755\n"


def test_names_go_and_come_anew(session_folder: Path, kind: tuple[str, ...]) -> None:
    with mounted(session_folder, "daemon", *kind) as own:
        top = own.mountpoint
        write_at_once(top / "boxes/2/value", b"5")
        number = (top / "boxes/2").stat().st_ino
        inside = os.open(top / "boxes/2", os.O_RDONLY | os.O_DIRECTORY)
        try:
            control(top, "remake 2")
            assert (top / "boxes/2/value").read_text() == "0\n"
            assert (top / "boxes/2").stat().st_ino != number
            # Who is still in the old one is not in the new one by accident.
            with pytest.raises(FileNotFoundError):
                os.open("value", os.O_RDONLY, dir_fd=inside)
            control(top, "remove 2")
            assert sorted(os.listdir(top / "boxes")) == ["0", "1"]
            with pytest.raises(FileNotFoundError):
                (top / "boxes/2/value").read_text()
        finally:
            os.close(inside)


def test_objects_made_anew_at_each_look_disturb_nobody(top: Path) -> None:
    program = "for turn in range(300): assert open('fresh/1/value').read() == '0\\n'"
    readers = [spawn(sys.executable, "-S", "-c", program, cwd=top) for _ in range(3)]
    try:
        for reader in readers:
            _, errors = reader.communicate(timeout=DEADLINE)
            assert (reader.returncode, errors) == (0, "")
    finally:
        for reader in readers:
            end_child(reader)


# -- waiting -------------------------------------------------------------------------------------------------


def test_events_come_from_the_opening_on(top: Path) -> None:
    control(top, "publish before")
    fd = os.open(top / "events", os.O_RDONLY)
    try:
        # Nothing is read yet, but the file is open.
        control(top, "publish first")
        assert os.read(fd, 3) == b"fir"
        assert os.read(fd, 4096) == b"st\n"
        control(top, "publish second")
        assert os.read(fd, 4096) == b"second\n"
    finally:
        os.close(fd)


def test_events_of_one_object(top: Path) -> None:
    fd = os.open(top / "boxes/1/events", os.O_RDONLY)
    try:
        write_at_once(top / "boxes/2/value", b"1")
        write_at_once(top / "boxes/1/value", b"2")
        assert os.read(fd, 4096) == b"box 1 2\n"
    finally:
        os.close(fd)


@pytest.mark.parametrize("signo", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("file", ["events", "inner/gate"])
def test_signals_end_a_blocking_read(top: Path, file: str, signo: signal.Signals) -> None:
    reader = spawn("cat", file, cwd=top)
    try:
        wait_until("cat waits", lambda: waits_in_kernel(reader.pid, READ))
        reader.send_signal(signo)
        assert reader.wait(DEADLINE) == -signo
    finally:
        end_child(reader)


def test_signal_ends_a_read_on_an_inherited_descriptor(top: Path) -> None:
    with (top / "events").open("rb", buffering=0) as opened:
        reader = subprocess.Popen(["cat"], stdin=opened, stdout=subprocess.DEVNULL, text=True)
        try:
            wait_until("cat waits", lambda: waits_in_kernel(reader.pid, READ))
            reader.send_signal(signal.SIGINT)
            assert reader.wait(DEADLINE) == -signal.SIGINT
        finally:
            end_child(reader)


def test_harmless_signals_do_not_end_a_read(top: Path) -> None:
    reader = spawn("cat", "events", cwd=top)
    try:
        wait_until("cat waits", lambda: waits_in_kernel(reader.pid, READ))
        for signo in (signal.SIGCHLD, signal.SIGWINCH, signal.SIGURG):
            reader.send_signal(signo)
        control(top, "publish still-here")
        assert reader.stdout is not None
        assert reader.stdout.readline() == "still-here\n"
    finally:
        end_child(reader)


def test_many_wait_while_others_read_and_write(session_folder: Path, kind: tuple[str, ...]) -> None:
    with mounted(session_folder, "daemon", *kind) as own:
        top = own.mountpoint
        # More than the 99 tasks that pyfuse3 has by default.
        readers = [spawn("cat", "inner/gate", cwd=top) for _ in range(120)]
        writers = []
        try:
            for number in range(20):
                # They write to the same file, and do not wait for each other.
                writers.append(spawn("bash", "-c", "echo 3600 > inner/slow_interruptible", cwd=top))
                begun = f"{number + 1}\n"
                wait_until("one more writes", reads, top / "inner/started", begun)
            wait_until("all wait", lambda: all(waits_in_kernel(reader.pid, READ) for reader in readers))
            for number in range(100):
                write_at_once(top / "boxes/1/value", str(number).encode())
                assert (top / "boxes/1/value").read_text() == f"{number}\n"
            control(top, "gate")
            assert {reader.communicate(timeout=DEADLINE)[0] for reader in readers} == {"open\n"}
            for writer in writers:
                writer.send_signal(signal.SIGINT)
            # bash ends by the signal it got; a shell may also tell the errno first.
            assert all(writer.wait(DEADLINE) != 0 for writer in writers)
            wait_until("handlers heard of it", lambda: len((top / "inner/done").read_text().splitlines()) == 20)
            told = {line.split()[1] for line in (top / "inner/done").read_text().splitlines()}
            assert told == {str(writer.pid) for writer in writers}
        finally:
            for process in readers + writers:
                end_child(process)


def test_early_answer_lets_the_writer_go_on(session_folder: Path, kind: tuple[str, ...]) -> None:
    with mounted(session_folder, "daemon", *kind) as own:
        top = own.mountpoint
        assert run("echo moved > inner/early && cat pulse", cwd=top).stdout == f"{own.process.pid}\n"
        assert (top / "inner/done").read_text() == ""
        control(top, "gate")
        wait_until("the handler ended", lambda: (top / "inner/done").read_text() == "early moved\n")


# -- the end -------------------------------------------------------------------------------------------------


def test_end_of_the_daemon_frees_who_waits(session_folder: Path, kind: tuple[str, ...]) -> None:
    with mounted(session_folder, "daemon", *kind) as own:
        readers = [spawn("cat", "events", cwd=own.mountpoint) for _ in range(5)]
        try:
            wait_until("all wait", lambda: all(waits_in_kernel(reader.pid, READ) for reader in readers))
            own.end()
            assert all(reader.wait(DEADLINE) == 1 for reader in readers)
            assert own.process.returncode == 0
            assert not is_mounted(own.mountpoint)
        finally:
            for reader in readers:
                end_child(reader)


def test_mount_over_the_mount_of_a_killed_daemon(session_folder: Path) -> None:
    with mounted(session_folder) as first:
        first.process.kill()
        first.process.wait(DEADLINE)
        assert is_mounted(first.mountpoint)
        second = Daemon("daemon", first.mountpoint)
        try:
            assert (second.mountpoint / "pulse").read_text() == f"{second.process.pid}\n"
        finally:
            second.end()
        assert not is_mounted(first.mountpoint)


# -- only on nodes -------------------------------------------------------------------------------------------


def test_without_the_link_everything_fails_at_once(session_folder: Path) -> None:
    with mounted(session_folder, "daemon", "remote") as own:
        top = own.mountpoint
        readers = [spawn("cat", file, cwd=top) for file in ("events", "inner/gate")]
        writer = spawn("bash", "-c", "echo 1 > inner/slow_interruptible", cwd=top)
        try:
            wait_until("all wait", lambda: all(waits_in_kernel(reader.pid, READ) for reader in readers))
            wait_until("one writes", lambda: reads(top / "inner/started", "1\n"))
            # Its own answer may be lost with the link.
            run("echo cut > inner/control", cwd=top)
            for process in [*readers, writer]:
                _, errors = process.communicate(timeout=DEADLINE)
                assert "Host is down" in errors
            for command in ("cat pulse", "ls boxes", "echo 1 > boxes/1/value", "chmod 700 boxes/1"):
                *verb, file = command.split(" ")
                assert "Host is down" in run(f"{' '.join(verb)} {top}/{file}", cwd=session_folder).stderr
        finally:
            for process in [*readers, writer]:
                end_child(process)


def test_job_pid_is_that_of_the_inner_namespace(session_folder: Path) -> None:
    assert job_process_of(os.getpid()) == 0 or len(numbers_of(os.getpid())) > 1
    jobs = spawn("unshare", "--pid", "--fork", "--kill-child", "sh", "-c", "sleep 1000 & wait", cwd=session_folder)
    try:
        wait_until("the job runs", lambda: len(descendants(jobs.pid)) == 2)
        init, sleeper = sorted(descendants(jobs.pid))
        assert job_process_of(init) == 1
        assert job_process_of(sleeper) == numbers_of(sleeper)[-1] > 1
    finally:
        end_child(jobs)


def numbers_of(pid: int) -> list[int]:
    status = Path(f"/proc/{pid}/status").read_text()
    return [int(word) for line in status.splitlines() if line.startswith("NStgid:") for word in line.split()[1:]]


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found
