"""The table of errors: every way to ask for a move, what goes wrong, the errno and the words that say so."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpfs import kernel
from tests.building import build_victims
from tests.cluster.held import holding
from tests.cluster.moving import check_counting, counting, echo, finish, move, place
from tests.cluster.virtual import VirtualCluster, children, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

USER = 1234
SHELLS = ["bash", "dash"]
# Listens on a TCP socket; a line on stdin has it say that it is well.
LISTENER = (
    "import socket, sys; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print('on', flush=True); "
    "sys.stdin.readline(); print('off', flush=True)"
)


VICTIMS = Path(__file__).parent.parent / "victims"


@pytest.fixture(scope="module")
def it(session_folder: Path, gates: Path) -> Iterator[VirtualCluster]:
    with holding(gates), cluster(session_folder / "errors", nodes=4) as made:
        made.write("nodes/2/state", "down")
        made.write("nodes/3/state", "unavailable")
        made.write("nodes/1/mode", "000")
        yield made


@pytest.fixture
def counter() -> Iterator[subprocess.Popen[str]]:
    with counting() as process:
        yield process


def sh(shell: str, script: str, user: int | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end."""
    return subprocess.run(
        [shell, "-c", script], capture_output=True, text=True, timeout=100, check=False, user=user, group=user,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def said(shell: str, stderr: str, words: str) -> bool:
    """Whether a shell said so, in one line. dash does not look at the errno of a write."""
    return stderr.count("\n") == 1 and (words in stderr or (shell == "dash" and "echo: I/O error" in stderr))


# What each asks for, as whom, and what comes of it; {m} is the mount point, {file} what is written to.
REFUSED = [
    ("nodes/77/migrate", "$$", None, ("No such file or directory", "Directory nonexistent")),
    ("procs/$$/node", "77", None, ("No such file or directory",)),
    ("procs/$$/node", "-2", None, ("Invalid argument",)),
    ("nodes/2/migrate", "$$", None, ("Host is down",)),
    ("procs/$$/node", "2", None, ("Host is down",)),
    ("nodes/1/migrate", "$$", USER, ("Permission denied",)),
    ("procs/$$/node", "1", USER, ("Permission denied",)),
    ("nodes/3/migrate", "$$", USER, ("Permission denied",)),
    ("nodes/0/migrate", "1", USER, ("Permission denied",)),
    ("nodes/0/migrate", "banana", None, ("Invalid argument",)),
    ("procs/$$/node", "banana", None, ("Invalid argument",)),
    ("nodes/0/migrate", "4190000", None, ("No such process",)),
]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("start", [-1, 0])
@pytest.mark.parametrize(("file", "text", "user", "words"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_script_learns_why_and_goes_on_where_it_is(
    it: VirtualCluster, shell: str, start: int, file: str, text: str, user: int | None, words: tuple[str, ...]
) -> None:
    go = "" if start == -1 else f"echo $$ > {it.mount}/nodes/{start}/migrate; "
    done = sh(shell, f"{go}echo {text} > {it.mount}/{file}; echo $?; hostname", user)
    status, where = done.stdout.split()
    assert status != "0"
    assert where == (os.uname().nodename if start == -1 else f"n{start}")
    assert any(said(shell, done.stderr, word) for word in words), done.stderr


def test_root_may_use_an_unavailable_node(it: VirtualCluster, counter: subprocess.Popen[str]) -> None:
    move(it, counter.pid, 3)
    check_counting(finish(counter), counter.pid)


FORMS = [
    "printf {pid} > {file}",
    "printf '%d\\n' {pid} > {file}",
    "echo -n {pid} >> {file}",
    "echo {pid} >| {file}",
    "echo {pid} | tee {file} >/dev/null",
    "echo '  {pid}  ' > {file}",
]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_write_a_line_moves(
    it: VirtualCluster, counter: subprocess.Popen[str], shell: str, form: str
) -> None:
    if shell == "dash" and "-n" in form:
        form = form.replace("echo -n", "/bin/echo -n")
    done = sh(shell, form.format(pid=counter.pid, file=f"{it.mount}/nodes/0/migrate"))
    assert (done.returncode, done.stderr) == (0, "")
    assert place(it, counter.pid) == "0"
    check_counting(finish(counter), counter.pid)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("form", FORMS[:4])
def test_every_way_to_write_a_line_moves_the_writer(it: VirtualCluster, shell: str, form: str) -> None:
    done = sh(shell, form.format(pid="$$", file=f"{it.mount}/nodes/0/migrate").replace("'  $$  '", "$$") + "; hostname")
    assert (done.stdout, done.stderr) == ("n0\n", "")


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("file", ["nodes/0/migrate", "nodes/0/mode", "nodes/0/state"])
def test_a_megabyte_of_text_is_nonsense(it: VirtualCluster, shell: str, file: str) -> None:
    before = it.read("nodes/0/state"), it.read("nodes/0/mode")
    done = sh(shell, f"head -c 1000000 /dev/zero | tr '\\0' 1 > {it.mount}/{file}")
    assert done.returncode != 0 and "write error: Invalid argument" in done.stderr
    text = "x" * 1000
    done = sh(shell, f"t={text}; t=$t$t$t$t$t; t=$t$t$t$t$t$t$t$t; echo $t$t$t$t$t$t$t$t$t$t > {it.mount}/{file}")
    assert done.returncode != 0 and said(shell, done.stderr, "Invalid argument")
    assert (it.read("nodes/0/state"), it.read("nodes/0/mode")) == before


def test_who_moves_already_is_busy(it: VirtualCluster, counter: subprocess.Popen[str], gates: Path) -> None:
    gate = gates / "transfer"
    gate.touch()
    with subprocess.Popen(["bash", "-c", f"echo {counter.pid} > {it.mount}/nodes/0/migrate"]) as first:
        try:
            wait_until(gate.with_suffix(".reached").exists, "the move should have come to the gate")
            assert it.read(f"procs/{counter.pid}/node") == "migrating\n"
            for text, file in ((counter.pid, "nodes/3/migrate"), (3, f"procs/{counter.pid}/node")):
                done = echo(it, text, file)
                assert done.returncode != 0 and "Device or resource busy" in done.stderr
        finally:
            gate.unlink()
        assert first.wait(60) == 0
    assert place(it, counter.pid) == "0"
    check_counting(finish(counter), counter.pid)


@pytest.mark.parametrize("route", ["nodes/0/migrate", "procs/{pid}/node"])
def test_what_cannot_move_is_told_in_words(it: VirtualCluster, route: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LISTENER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "on\n"
        text = 0 if route.startswith("procs") else process.pid
        done = echo(it, text, route.format(pid=process.pid))
        assert done.returncode != 0 and "Operation not supported" in done.stderr
        last = it.read("nodes/0/migrate").splitlines()[-1]
        assert last.startswith(f"{process.pid} EOPNOTSUPP ") and "TCP socket" in last
        assert "TCP socket" in it.read(f"procs/{process.pid}/cantmove")
        assert process.communicate("\n", timeout=60)[0] == "off\n"


def test_what_holds_a_machine_together_stays(it: VirtualCluster) -> None:
    bound = {1: "it is the init of its machine", it.pid("master"): "it is the daemon that would move it"}
    if os.path.exists("/proc/2") and Path("/proc/2/comm").read_text() == "kthreadd\n":  # not seen in a container
        bound[2] = "it is a kernel thread"
    for pid, why in bound.items():
        for text in (pid, f"{pid} onexec", f"{pid} tree"):
            done = echo(it, text, "nodes/1/migrate")
            assert done.returncode != 0 and "Operation not supported" in done.stderr
        assert it.read(f"procs/{pid}/cantmove") == f"{why}\n"
        assert it.read("nodes/1/migrate").splitlines()[-1].endswith(f" {why}")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_that_cannot_move_goes_on(it: VirtualCluster, shell: str) -> None:
    file = f"{it.mount}/nodes/0/migrate"
    with socket.create_server(("127.0.0.1", 0)) as listening:  # which it has inherited
        done = subprocess.run(
            [shell, "-c", f"echo $$ > {file}; echo $?; tail -1 {file}; hostname"], pass_fds=[listening.fileno()],
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
    status, move_line, where = done.stdout.splitlines()
    assert status != "0" and where == os.uname().nodename
    assert said(shell, done.stderr, "Operation not supported")
    assert " EOPNOTSUPP " in move_line and "a listening TCP socket" in move_line


@pytest.fixture
def silent_mount(tmp_path: Path) -> Iterator[Path]:
    """A FUSE mount that answers the first question and none after it: who asks there waits uninterruptibly."""
    mount, device = tmp_path / "silent", os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    mount.mkdir()
    kernel.mount("silent", str(mount), "fuse", 0, f"fd={device},rootmode=40755,user_id=0,group_id=0")
    try:
        head = os.read(device, 1 << 17)
        unique = head[8:16]
        # struct fuse_out_header and fuse_init_out: version 7.31, writes of a page (linux/fuse.h)
        init = struct.pack("<IIIIHHIIHH", 7, 31, 0, 0, 16, 12, 4096, 1, 1, 0) + bytes(32)
        os.write(device, struct.pack("<Ii", 16 + len(init), 0) + unique + init)
        yield mount
    finally:
        os.close(device)  # whoever waits gets ENOTCONN
        subprocess.run(["umount", "-l", mount], check=True)


@pytest.mark.parametrize("who", ["parent", "child"])
def test_vfork_without_exec_is_refused_and_left_alone(it: VirtualCluster, tmp_path: Path, who: str) -> None:
    build_victims()
    stop = tmp_path / "stop"
    parent = subprocess.Popen([VICTIMS / "bin" / "vfork", stop])
    try:
        wait_until(lambda: children(parent.pid), "it should have its child")
        (child,) = children(parent.pid)
        done = echo(it, parent.pid if who == "parent" else child, "nodes/0/migrate")
        assert "not supported" in done.stderr
        assert "vfork" in it.read("nodes/0/migrate").splitlines()[-1]
        assert children(parent.pid) == [child] and parent.poll() is None
        stop.touch()
        assert parent.wait(60) == 0
    finally:
        stop.touch()
        parent.kill()
        parent.wait()


def test_who_cannot_be_stopped_times_out(it: VirtualCluster, silent_mount: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os; print(flush=True); print(os.path.exists('{silent_mount}/x'))"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == b"\n"
    wait_until(lambda: Path(f"/proc/{process.pid}/wchan").read_text() == "request_wait_answer", "it should wait")
    done = echo(it, process.pid, "nodes/0/migrate")
    assert done.returncode != 0 and "timed out" in done.stderr
    last = it.read("nodes/0/migrate").splitlines()[-1]
    assert last.startswith(f"{process.pid} ETIMEDOUT ") and "uninterruptible" in last
    # What it waits for comes at last: nobody holds it any more.
    with contextlib.suppress(OSError):
        kernel.umount(str(silent_mount), kernel.MNT_FORCE)
    assert process.communicate(timeout=60) == (b"False\n", None)
