"""Several jobs of one terminal on one node: they share it as they do at home."""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
from pathlib import Path

import pytest

from tests.cluster.desk import PROMPT, Desk, desk, session, stat_of
from tests.cluster.test_commands import BPSH
from tests.cluster.test_terminals import CURSES, go, lives, move, use_job_control
from tests.cluster.virtual import VirtualCluster, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def it(session_folder):
    with cluster(session_folder / "shared", nodes=2) as made:
        yield made


@pytest.fixture
def at():
    with desk() as made:
        yield made


def answering(it: VirtualCluster, at: Desk, name: str, node: int = 1) -> int:
    """A job in the foreground, moved to a node: answers each line with its name, and ends with 6 at the end of file."""
    at.type(f"sh -c 'echo be\"\"gun {name}; while read line; do echo {name}:$line:; done; exit 6'\r")
    at.see(f"begun {name}\r\n")
    pid = at.foreground()
    move(it, pid, node)
    ask(at, name, "first")
    return pid


def ask(at: Desk, name: str, line: str) -> None:
    at.type(f"{line}\r")
    at.see(f"{line}\r\n{name}:{line}:\r\n")


def suspend(at: Desk) -> None:
    at.type("\x1a")
    at.see("Stopped", PROMPT)


def fg(at: Desk, job: int) -> None:
    at.type(f"fg %{job}\r")
    at.see("\nsh -c")  # the job's command line
    at.await_turn()


def stopped(it: VirtualCluster, pid: int) -> None:
    wait_until(lambda: stat_of(pid)[0] == "T" and it.read(f"procs/{pid}/state") == "stopped\n", "it should stop")


def test_the_keyboard_is_for_the_one_in_the_foreground(it, at):
    one = answering(it, at, "one")
    suspend(at)
    answering(it, at, "two")
    suspend(at)
    for turn in range(2):
        fg(at, 1)
        ask(at, "one", f"to one {turn}")
        suspend(at)
        fg(at, 2)
        ask(at, "two", f"to two {turn}")
        suspend(at)
    at.run("bg %1")
    stopped(it, one)  # it reads in the background
    at.run("")
    fg(at, 2)
    ask(at, "two", "still here")
    at.type("\x03")
    at.see("^C", PROMPT)
    assert at.status() == 130 and stat_of(one)[0] == "T"
    fg(at, 1)
    ask(at, "one", "alone")
    at.type("\x04")
    at.see(PROMPT)
    assert at.status() == 6


def test_the_first_leaves_and_the_second_stays(it, at):
    one = answering(it, at, "one")
    suspend(at)
    two = answering(it, at, "two")
    for node in (0, -1, 1):
        move(it, one, node)
        ask(at, "two", f"while one is at {node}")
        suspend(at)
        fg(at, 1)
        ask(at, "one", f"at {node}")
        suspend(at)
        fg(at, 2)
    move(it, two, -1)
    ask(at, "two", "home")
    suspend(at)
    fg(at, 1)
    ask(at, "one", "there")
    move(it, two, 1)
    suspend(at)
    fg(at, 2)
    ask(at, "two", "there again")
    at.type("\x04")
    at.see(PROMPT)
    assert at.status() == 6
    fg(at, 1)
    ask(at, "one", "last")
    at.type("\x1c")
    at.see("Quit", PROMPT)
    assert at.status() == 131


class Gate:
    """A FIFO of each job that waits to be let on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fds: dict[str, int] = {}

    def path(self, name: str) -> Path:
        path = self._folder / name
        if name not in self._fds:
            os.mkfifo(path)
            self._fds[name] = os.open(path, os.O_RDWR)
        return path

    def let_on(self, name: str) -> None:
        os.write(self._fds[name], b"\n")

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)


@pytest.fixture
def gate(tmp_path):
    made = Gate(tmp_path)
    yield made
    made.close()


def waiting(it: VirtualCluster, at: Desk, gate: Gate, name: str, then: str, node: int = 1) -> int:
    """A job in the background, moved to a node, that does `then` once it is let on."""
    path = gate.path(name)
    pid = at.started(f"sh -c 'read x < {path}; {then}'")
    wait_until(lambda: Path(f"/proc/{pid}/fd/0").exists() and os.readlink(f"/proc/{pid}/fd/0") == str(path), "it reads")
    move(it, pid, node)
    return pid


def test_output_of_all_comes_in_its_order(it, at, gate):
    lines = 400
    count = f"i=0; while [ $i -lt {lines} ]; do i=$((i+1)); echo %s$i.; done"
    for name in "ab":
        waiting(it, at, gate, name, count % name)
    at.type(f"sh -c 'echo be\"\"gun; read x < {gate.path('c')}; {count % 'c'}'\r")
    at.see("begun\r\n")
    move(it, at.foreground(), 1)
    for name in "abc":
        gate.let_on(name)
    at.see(f"c{lines}.\r\n", PROMPT)
    at.mark = 0
    for name in "ab":
        at.see(f"{name}{lines}.\r\n")
    for name in "abc":
        assert re.findall(rf"{name}(\d+)\.\r\n", at.text) == [str(n + 1) for n in range(lines)]
    assert at.run("wait; echo status=$?").endswith("status=0\n")
    wait_until(lambda: not pumps(at), "no process should be left that passes output on")


def pumps(at: Desk) -> list[int]:
    """Processes that go on for ghosts that have ended."""
    return [pid for pid in session(at.shell.pid) if Path(f"/proc/{pid}/comm").read_text() == "bpfs-pump\n"]


def test_tostop_stops_the_one_that_writes(it, at, gate):
    writer = waiting(it, at, gate, "writer", 'echo wri""tten; exit 5')
    other = at.started("sleep 1000")
    move(it, other, 1)
    at.run("stty tostop")
    answering(it, at, "three")
    gate.let_on("writer")
    stopped(it, writer)
    ask(at, "three", "not disturbed")
    assert lives(it, other) and "written" not in at.text
    at.type("\x04")
    at.see(PROMPT)
    at.type("fg %1\r")
    at.see("\nsh -c", "\nwritten\r\n", PROMPT)
    assert at.status() == 5 and lives(it, other)


def test_a_full_screen_program_beside_a_job_that_writes(it, at, gate, tmp_path):
    (tmp_path / "full.py").write_text(CURSES)
    writer = waiting(it, at, gate, "writer", 'echo from the ba""ck; exit 4')
    at.type(f"TERM=xterm {sys.executable} {tmp_path}/full.py\r")
    at.see("full screen")
    move(it, at.foreground(), 1)
    at.type("a")
    at.see("a")
    gate.let_on("writer")
    at.see("from the back\n")
    at.type("\x1bOA")
    at.see("KEY_UP")
    wait_until(lambda: stat_of(writer)[0] in "XZ", "it should have ended")
    suspend(at)
    assert "Exit 4" in at.text
    assert at.local_modes() & termios.ICANON == 0  # the line editor's own
    at.type("fg\r")
    at.see("full screen")
    at.type("q")
    at.see("keysread\r\n", PROMPT)
    assert at.status() == 0


def test_a_shell_beside_other_jobs_has_job_control(it, at):
    one = answering(it, at, "one")
    suspend(at)
    at.type("PS1='be''low> ' bash --norc --noprofile -i\r")
    at.see("below> ")
    go(it, at, 1, "below> ")
    use_job_control(at, "below> ")
    assert at.run("echo tty > /dev/tty; exec 3<>/dev/tty; tty <&3", prompt="below> ").startswith("tty\n/dev/")
    at.type("suspend\r")
    at.see("Stopped", PROMPT)
    fg(at, 1)
    ask(at, "one", "in between")
    suspend(at)
    at.type("fg %2\r")
    at.see("\n", "below> ")
    use_job_control(at, "below> ")
    at.type("exit\r")
    at.see(PROMPT)
    stopped(it, one)


def test_a_pipeline_gets_each_signal_once(it, at, tmp_path):
    (tmp_path / "trap.sh").write_text(
        "trap 'echo got $1 >&2; n=$((n+1)); [ $n -lt 2 ] || exit 3' INT\nwhile :; do read x; done\n"
    )
    at.type(f"sh {tmp_path}/trap.sh a < /dev/tty | sh {tmp_path}/trap.sh b < /dev/tty\r")
    wait_until(lambda: at.foreground() != at.shell.pid, "it should begin")
    first = at.foreground()
    wait_until(lambda: len(group(at, first)) == 2, "both should be there")
    for pid in group(at, first):
        move(it, pid, 1)
    for _ in range(2):
        at.type("\x03")
        at.see("got ", "got ")
    at.see(PROMPT)
    assert at.text.count("got a") == at.text.count("got b") == 2
    assert at.run("echo ${PIPESTATUS[*]}") == "3 3\n"


def group(at: Desk, leader: int) -> list[int]:
    return [pid for pid in session(at.shell.pid) if stat_of(pid)[1][1] == str(leader)]


def test_a_ghost_that_is_stopped_by_force_does_not_keep_the_others_output(it, at, gate):
    one = at.started("sh -c 'while :; do sleep 1000; done'")
    path = gate.path("two")
    two = waiting(it, at, gate, "two", f"exec < {path}; for i in 1 2 3; do echo line$i.; read x; done")
    move(it, one, 1)
    os.kill(one, signal.SIGSTOP)
    stopped(it, one)
    for n in (1, 2, 3):
        at.type("")
        gate.let_on("two")
        at.see(f"line{n}.\r\n")
    gate.let_on("two")
    wait_until(lambda: stat_of(two)[0] in "XZ", "it should end")
    os.kill(one, signal.SIGKILL)


def test_bpsh_beside_bpsh(it, at):
    bpsh = f"BPFS={it.mount} {BPSH} 1"
    first = at.started(f"{bpsh} sleep 1000")
    at.type(f"{bpsh} sh -c 'echo be\"\"gun; read line; echo got:$line:; read more'\r")
    at.see("begun\r\n")
    at.type("a line\r")
    at.see("got:a line:\r\n")
    suspend(at)
    at.type("fg\r")
    at.see("bpsh")
    at.await_turn()
    at.type("\x03")
    at.see("^C", PROMPT)
    assert at.status() == 130
    assert lives(it, first)
    at.type("fg\r")
    at.see("bpsh")
    at.await_turn()
    assert at.foreground() == first
    at.type("\x03")
    at.see("^C", PROMPT)
    assert at.status() == 130


def test_a_terminal_that_hangs_up_takes_all_its_jobs_along(it, at):
    one = answering(it, at, "one")
    suspend(at)
    two = at.started("sleep 1000")
    move(it, two, 1)
    three = answering(it, at, "three")
    at.hang_up()
    for pid in (one, two, three):
        wait_until(lambda pid=pid: not (it.mount / f"procs/{pid}").exists(), "it should be hung up")
