"""Every kind of descriptor: read from a real process, sent through msgpack, made anew in another, checked there."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest

from engine import descriptors
from engine.descriptors import Descriptors, Placed, Row, after_placed, at_resume, close_all, inspect, rebuild
from engine.linux.credentials import EVERYTHING, Credentials
from tests.engine.births import VICTIMS

ROOT = Credentials(0, 0, (), EVERYTHING)
SCRIPT = VICTIMS / "descriptors.py"
KINDS = [
    "file", "directory", "deleted", "devices", "pipe", "fifo", "eventfd", "timerfd", "signalfd", "epoll", "inotify",
    "memfd", "pidfd", "sockets", "locks", "owner",
]  # fmt: skip

MOVED = [*KINDS, "proc"]  # the last not into another process


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@contextmanager
def stopped(arguments: list[str], **more: Any) -> Iterator[int]:
    """A process that has set itself up and stopped."""
    with subprocess.Popen([sys.executable, *arguments], **more) as process:
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                process.returncode = os.waitstatus_to_exitcode(status)
                pytest.fail(f"the victim ended at its set-up ({process.returncode})")
            yield process.pid
        finally:
            process.kill()


def setup(kind: str, folder: Path) -> Any:
    return stopped([str(SCRIPT), kind, str(folder)], stdin=subprocess.DEVNULL)


def through_msgpack(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = msgpack.unpackb(msgpack.packb(table))
    return result


def own(found: Descriptors) -> list[dict[str, Any]]:
    """The table without the standard descriptors, which are whatever pytest gave them."""
    table = [entry for entry in found.table if entry["fds"][0][0] > 2]
    return through_msgpack(table)


def hand_over(control: socket.socket, placed: list[Placed], rows: list[Row]) -> None:
    wanted = [(one.target_fd, one.cloexec) for one in placed]
    control.sendmsg(
        [pickle.dumps((wanted, plain(rows)))],
        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(one.local_fd.to_bytes(4, "little") for one in placed))],
    )


def plain(rows: list[Row]) -> list[tuple[int, tuple[int | bytes, ...], bool, str]]:
    return [(row.number, row.arguments, row.must, row.label) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind: str, tmp_path: Path) -> None:
    with setup(kind, tmp_path) as source:
        found = inspect(source)
        assert found.refusals == []
        table = own(found)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [sys.executable, str(SCRIPT), kind, str(tmp_path), str(theirs.fileno())]
        with ours, theirs, subprocess.Popen(arguments, pass_fds=[theirs.fileno()]) as rebuilt:
            theirs.close()
            placed = rebuild(table, {}, os.getpid(), ROOT, rebuilt.pid)
            hand_over(ours, placed, after_placed(table, rebuilt.pid, os.getpgid(rebuilt.pid)))
            close_all(placed)
            os.kill(source, signal.SIGKILL)
            os.waitpid(source, 0)
            ours.send(pickle.dumps(plain(at_resume(table))))
            assert rebuilt.wait(60) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_inspecting_changes_nothing(kind: str, tmp_path: Path) -> None:
    with setup(kind, tmp_path) as source:
        assert inspect(source).refusals == []
        os.kill(source, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(source, 0)[1]) == 0


def python(code: str, **more: Any) -> Any:
    """A stopped process that has run some lines; number 10 is for what the test is about."""
    names = "os, sys, socket, struct, ctypes, fcntl, signal, select, subprocess, termios"
    move = "move = lambda f: (os.dup2(f, 10), os.close(f))"
    stop = "os.kill(os.getpid(), signal.SIGSTOP)"
    return stopped(["-c", f"import {names}\n{move}\n{code}\n{stop}"], **more)


REFUSED = {
    "TCP": ("s = socket.create_server(('127.0.0.1', 0)); move(s.detach())", "a listening TCP socket (127.0.0.1:"),
    "connected": (
        "l = socket.create_server(('127.0.0.1', 0)); s = socket.create_connection(l.getsockname()); l.close()\n"
        "move(s.detach())",
        "a TCP socket (127.0.0.1:",
    ),
    "TCP6": ("move(socket.socket(socket.AF_INET6).detach())", "a TCP socket ([::]:0)"),
    "UDP": ("move(socket.socket(type=socket.SOCK_DGRAM).detach())", "a UDP socket (0.0.0.0:0)"),
    "raw": ("move(socket.socket(2, 3, 1).detach())", "a raw IP socket"),
    "netlink": ("move(socket.socket(16, 3, 0).detach())", "a netlink socket"),
    "unix listening": (
        "s = socket.socket(1); s.bind('\\0bpfs-test-%d' % os.getpid()); s.listen(); move(s.detach())",
        "a listening unix socket (\0bpfs-test-",
    ),
    "unix to another": (
        "a, b = socket.socketpair(); p = subprocess.Popen(['sleep', '1000'], stdin=b); b.close()\n"
        "open(os.environ['PIDS'], 'w').write(str(p.pid)); move(a.detach())",
        "a unix socket to another process",
    ),
    "descriptors in flight": (
        "a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [0])\n"
        "os.dup2(a.fileno(), 11); os.dup2(b.fileno(), 10); a.close(); b.close()",
        "a unix socket with descriptors on their way in it",
    ),
    "ptmx": ("move(os.open('/dev/ptmx', os.O_RDWR))", "the master side of a terminal (/dev/ptmx)"),
    "device": ("f = os.open('/dev/kmsg', os.O_RDONLY); move(f)", "the device /dev/kmsg"),
    "namespace": ("f = os.open('/proc/self/ns/net', 0); move(f)", "a namespace (net:["),
    "pidfd": ("f = os.pidfd_open(os.getppid()); move(f)", "a pidfd of process "),
    "deleted directory": (
        "os.mkdir('d'); f = os.open('d', 0); os.rmdir('d'); move(f)", "a deleted directory",
    ),
    "unlinked name": (
        "f = os.open('f', os.O_CREAT); os.link('f', 'g'); os.unlink('f'); move(f)",
        "a file that its path does not lead to any more",
    ),
    "deleted, shared": (
        "f = os.open('f', os.O_CREAT | os.O_RDWR); os.unlink('f'); os.set_inheritable(f, True)\n"
        "p = subprocess.Popen(['sleep', '1000'], stdin=f); open(os.environ['PIDS'], 'w').write(str(p.pid))\n"
        "move(f)",
        "a deleted file that other processes have open, too",
    ),
    "memfd, shared": (
        "f = os.memfd_create('m'); p = subprocess.Popen(['sleep', '1000'], stdin=f)\n"
        "open(os.environ['PIDS'], 'w').write(str(p.pid)); move(f)",
        "a memfd that other processes have open, too",
    ),
    "epoll of a closed number": (
        "r, w = os.pipe(); e = select.epoll(); e.register(r, 1); os.dup2(r, 20); os.close(r); os.dup2(e.fileno(), 10)\n"
        "e.close()",
        "an epoll set that watches descriptor 3, which was closed",
    ),
    "inotify with events": (
        "f = ctypes.CDLL(None).inotify_init(); ctypes.CDLL(None).inotify_add_watch(f, b'.', 0x100); open('new', 'w')\n"
        "move(f)",
        "an inotify queue with events that have not been read",
    ),
    "lease": (
        "f = os.open('f', os.O_CREAT); fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_RDLCK); move(f)",
        "has a lease on ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str, tmp_path: Path) -> None:
    code, sentence = REFUSED[what]
    pids = tmp_path / "pids"
    with python(code, cwd=tmp_path, stdin=subprocess.DEVNULL, env={**os.environ, "PIDS": str(pids)}) as pid:
        try:
            (refusal,) = inspect(pid).refusals
        finally:
            if pids.exists():
                os.kill(int(pids.read_text()), signal.SIGKILL)
    assert refusal.startswith("fd 10 ") and sentence in refusal


def test_refused_for_its_size(tmp_path: Path) -> None:
    code = "f = os.memfd_create('m'); os.write(f, bytes(20000)); move(f)"
    with python(code, stdin=subprocess.DEVNULL) as pid:
        assert inspect(pid).refusals == []
        (refusal,) = inspect(pid, content_limit=10000).refusals
    assert refusal == "fd 10 has 20000 bytes that would have to travel (limit: 10000 more)"


def test_standard_descriptors(tmp_path: Path) -> None:
    out, into = os.pipe()
    code = "os.dup2(1, 10); os.set_blocking(1, False); os.close(2)"
    with open(tmp_path / "file", "w+") as file, python(code, stdin=file, stdout=into) as pid:
        os.close(into)
        found = inspect(pid)
        assert found.refusals == []
        (external,) = found.externals
        assert external["fds"] == [1, 10] and external["kind"] == "pipe" and external["stdio"]
        assert external["access"] == os.O_WRONLY and external["flags"] & os.O_NONBLOCK
        assert external["termios"] is None and external["ino"] == os.fstat(out).st_ino
        # A relay in its place: another pipe.
        relay_out, relay_in = os.pipe()
        placed = rebuild(through_msgpack(found.table), {external["key"]: relay_in}, os.getpid(), ROOT, pid)
        local = {one.target_fd: one.local_fd for one in placed}
        assert set(local) == {0, 1, 10} and local[1] == local[10]
        assert not os.get_blocking(local[1])
        assert os.path.samestat(os.fstat(local[0]), os.fstat(file.fileno()))
        os.write(local[10], b"relayed")
        assert os.read(relay_out, 100) == b"relayed"
        close_all(placed)
        with pytest.raises(OSError, match="no relay for descriptor 1"):
            rebuild(found.table, {}, os.getpid(), ROOT, pid)
        for fd in (relay_out, relay_in, out):
            os.close(fd)


def test_terminal() -> None:
    master, slave = os.openpty()
    code = "termios.tcsetwinsize(0, (33, 44)); os.dup2(os.open(os.ttyname(0), os.O_RDWR), 255); os.close(3)"
    with python(code, stdin=slave, stdout=slave, stderr=slave) as pid:
        found = inspect(pid)
        assert found.refusals == []
        standard, other = found.externals
        assert standard["fds"] == [0, 1, 2] and standard["stdio"] and other["fds"] == [255] and not other["stdio"]
        for external in found.externals:
            assert external["kind"] == "tty" and external["access"] == os.O_RDWR
            assert len(external["termios"]) == 36 and external["winsize"][:4] == b"\x21\0\x2c\0"
    os.close(master)
    os.close(slave)


def test_socket_as_standard_descriptor() -> None:
    ours, theirs = socket.socketpair()
    with python("os.dup2(0, 5)", stdin=theirs) as pid:
        theirs.close()
        external = inspect(pid).externals[0]
        assert (external["kind"], external["fds"], external["access"]) == ("socket", [0, 5], os.O_RDWR)
    ours.close()
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams, python("", stdin=datagrams) as pid:
        assert inspect(pid).refusals == ["fd 0 is a UDP socket (0.0.0.0:0)"]


def test_nameless_file_of_the_parent_as_output(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
    with python("", stdout=fd, stdin=subprocess.DEVNULL) as pid:
        found = inspect(pid)
        assert found.refusals == []
        assert [(e["kind"], e["fds"]) for e in found.externals if 1 in e["fds"]] == [("file", [1])]
    os.close(fd)


def test_one_end_of_a_pipe_is_external_and_two_with_another_holder() -> None:
    out, into = os.pipe()
    with python("os.dup2(0, 10); r, w = os.pipe(); os.dup2(r, 20)", stdin=out) as pid:
        kinds = {entry["fds"][0][0]: entry["kind"] for entry in inspect(pid).table}
        assert kinds[0] == "external" and kinds[3] == "pipe" and kinds[4] == "pipe"
    with python("os.dup2(0, 10); os.dup2(1, 11)", stdin=out, stdout=into) as pid:
        assert [e["fds"] for e in inspect(pid).externals if e["kind"] == "pipe"] == [[0, 10], [1, 11]]
    os.close(out)
    os.close(into)


def test_the_table_of_kinds_is_complete() -> None:
    from engine.descriptors import table

    names = [kind.name for kind in table.KINDS]
    modules = {path.stem for path in Path(descriptors.__file__).parent.glob("*.py")}
    assert {"eventfd", "timerfd", "signalfd", "epoll", "inotify", "memfd", "pidfd"} <= modules & set(names)
    assert names[-1] == "other"
