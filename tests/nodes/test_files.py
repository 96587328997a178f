# SPDX-License-Identifier: GPL-2.0-or-later
"""The files of the root and of nodes/N, on a real mount, over nodes that nobody is."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tree.mounted import DEADLINE, Daemon, end_child, mounted, run, wait_until


@pytest.fixture
def daemon(session_folder: Path) -> Iterator[Daemon]:
    with mounted(session_folder, "nodes_daemon", "12") as running:
        yield running


@pytest.fixture
def top(daemon: Daemon) -> Path:
    return daemon.mountpoint


def errno_of(path: Path, text: str) -> int:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        return error.errno or 0
    finally:
        os.close(fd)
    return 0


def test_root_and_links(top: Path) -> None:
    assert sorted(os.listdir(top)) == ["events", "master", "nodes", "self", "status"]
    assert os.readlink(top / "self") == os.readlink(top / "master") == "nodes/-1"
    assert run("ls nodes", cwd=top).stdout.split() == sorted(map(str, range(-1, 12)))
    assert (top / "master/kernel").read_text() == f"{os.uname().release}\n"
    assert (top / "master/cpus").read_text() == f"{len(os.sched_getaffinity(0))}\n"


def test_status_has_a_line_a_node(top: Path) -> None:
    status = (top / "status").read_text().splitlines()
    assert len(status) == 12
    assert status[3] == "3 up 111 root root 10.0.0.3"


def test_what_is_only_read_cannot_be_written_by_root_either(top: Path) -> None:
    done = run("echo x > status", cwd=top)
    assert done.returncode == 1
    assert done.stderr.endswith("write error: Permission denied\n")


def test_figures(daemon: Daemon, top: Path) -> None:
    node = top / "nodes/5"
    assert (node / "load").read_text() == "0.00 0.01 0.05 1/100 5\n"
    memory = dict(line.split() for line in (node / "memory").read_text().splitlines())
    assert int(memory["MemTotal"]) > int(memory["MemFree"]) > 0
    assert float((node / "uptime").read_text()) > 0
    assert (node / "address").read_text() == "10.0.0.5\n"
    there = [line.split() for line in (node / "stat").read_text().splitlines()]
    here = {words[0]: words[1:] for line in Path("/proc/stat").read_text().splitlines() if (words := line.split())}
    assert [words[0] for words in there][-5:] == ["ctxt", "btime", "processes", "procs_running", "procs_blocked"]
    assert there[0][0] == "cpu" and all(len(words) - 1 == len(here[words[0]]) for words in there)
    assert ["btime", *here["btime"]] in there
    for turn in range(200):
        daemon.tell(f"load 5 {turn}.00 0.00 0.00 1/1 {turn}")
        assert (node / "load").read_text() == f"{turn}.00 0.00 0.00 1/1 {turn}\n"
    assert run("cat nodes/*/load | wc -l", cwd=top).stdout == "13\n"


def test_state_and_reason(daemon: Daemon, top: Path) -> None:
    node = top / "nodes/5"
    for state in ["down", "up", "error", "unavailable", "up"] * 20:
        daemon.tell(f"state 5 {state}")
        assert (node / "state").read_text() == f"{state}\n"
        assert (node / "reason").read_text() == ("" if state == "up" else "as told\n")
        # Sizes are those of the contents, also right after a change.
        assert (node / "state").stat().st_size == len(state) + 1
    for text in ("boot", "banana", "up down", "UP", "1"):
        assert errno_of(node / "state", text) == errno.EINVAL
    assert errno_of(node / "state", "unavailable") == 0
    assert (node / "state").read_text() == "unavailable\n"
    assert errno_of(top / "nodes/-1/state", "down") == errno.EINVAL


def test_owner_group_and_mode_by_files_and_by_chown(top: Path) -> None:
    node = top / "nodes/7"
    assert (
        errno_of(node / "owner", "daemon") == errno_of(node / "group", "54321") == errno_of(node / "mode", "110") == 0
    )
    found = node.stat()
    assert (found.st_uid, found.st_gid) == (1, 54321)
    assert stat.S_IMODE(found.st_mode) == 0o555
    assert (top / "status").read_text().splitlines()[7] == "7 up 110 daemon 54321 10.0.0.7"
    assert run("chown root:root nodes/7; chmod 701 nodes/7", cwd=top).stderr == ""
    assert [(node / name).read_text() for name in ("owner", "group", "mode")] == ["root\n", "root\n", "101\n"]
    for name, text in [("owner", "nobody-has-this"), ("mode", "777"), ("mode", "8"), ("group", "-1"), ("mode", "")]:
        assert errno_of(node / name, text or "\n") == errno.EINVAL


def test_ordinary_users_read_and_owners_set_the_mode(top: Path) -> None:
    assert run("cat nodes/*/load nodes/*/state status >/dev/null", cwd=top, uid=12345).stderr == ""
    for name in ("state", "owner", "group", "mode"):
        assert "Permission denied" in run(f"echo up > nodes/7/{name}", cwd=top, uid=12345).stderr
    assert run("chown 12345 nodes/7", cwd=top).stderr == ""
    assert run("echo 100 > nodes/7/mode && chmod 110 nodes/7 && cat nodes/7/mode", cwd=top, uid=12345).stdout == "110\n"
    assert "Operation not permitted" in run("chown 0 nodes/7", cwd=top, uid=12345).stderr
    assert "Operation not permitted" in run("chmod 111 nodes/6", cwd=top, uid=12345).stderr


@pytest.mark.parametrize("name", ["12", "-2", "05", "x", "99999999999999999999"])
def test_nodes_that_are_not_there(top: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        (top / "nodes" / name / "load").read_text()


def test_events(daemon: Daemon, top: Path) -> None:
    every = os.open(top / "events", os.O_RDONLY)
    one = os.open(top / "nodes/5/events", os.O_RDONLY)
    try:
        daemon.tell("state 4 down")
        daemon.tell("state 5 down")
        daemon.tell("load 5 1.00 0 0 1/1 1")
        daemon.tell("mode 5 100")
        assert os.read(one, 4096) == b"node 5 state down (as told)\nnode 5 mode 100\n"
        assert os.read(every, 4096).startswith(b"node 4 state down (as told)\nnode 5 state down")
    finally:
        os.close(every)
        os.close(one)


def test_an_event_is_never_ahead_of_the_file(daemon: Daemon, top: Path) -> None:
    fd = os.open(top / "nodes/5/events", os.O_RDONLY)
    try:
        for turn in range(100):
            state = "down" if turn % 2 else "up"
            daemon.tell(f"state 5 {state}")
            assert os.read(fd, 4096).startswith(f"node 5 state {state}".encode())
            assert (top / "nodes/5/state").read_text() == f"{state}\n"
            daemon.tell(f"mode 5 {100 + turn % 2}")
            os.read(fd, 4096)
            assert (top / "nodes/5/mode").read_text() == f"{100 + turn % 2}\n"
    finally:
        os.close(fd)


def test_a_slow_reader_is_told_what_it_missed(daemon: Daemon, top: Path) -> None:
    fd = os.open(top / "nodes/5/events", os.O_RDONLY)
    try:
        for _ in range(50):
            daemon.tell("\n".join(f"mode 5 {100 + turn % 2}" for turn in range(100)))
        assert os.read(fd, 1 << 17).split(b"\n")[0] == b"lost 904"
    finally:
        os.close(fd)


def test_tail_follows_events(daemon: Daemon, top: Path) -> None:
    reader = subprocess.Popen(["cat", "events"], cwd=top, stdout=subprocess.PIPE, text=True)
    try:
        wait_until("cat waits", lambda: Path(f"/proc/{reader.pid}/syscall").read_text().startswith("0 "))
        daemon.tell("mode 3 100")
        assert reader.stdout is not None
        assert reader.stdout.readline() == "node 3 mode 100\n"
        reader.terminate()
        reader.wait(DEADLINE)
    finally:
        end_child(reader)
