"""Parents and children in different places: wait, stop, continue, kill and exit are as on one machine."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.moving import echo, place
from tests.cluster.virtual import cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MASTER = -1
NODES = (0, 1, 2)

# Forks as many children as it is told, says their pids, and then does what comes on stdin, a line each.
PARENT = """
import os, select, signal, sys
def fork(kept=()):
    pid = os.fork()
    if pid == 0:
        for number in {0, 1, 2} - set(kept):  # with 0 its ghost would read what is meant for the parent
            os.close(number)
        def tell():
            with open(f"{sys.argv[2]}/{os.getpid()}.new", "w") as file:
                print(os.getppid(), os.getpgrp(), os.getsid(0), file=file)
            os.rename(file.name, file.name[:-4])
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # A handler of Python's would be late for ever where the signal comes between SIGCONT and the pause begun anew.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        while signal.sigwait({signal.SIGUSR2}): tell()
    return pid
children = [fork({1, 2}) for _ in range(int(sys.argv[1]))]
got = []
signal.signal(signal.SIGCHLD, lambda number, frame: got.append(number))
print(*children, flush=True)
for line in sys.stdin:
    words = line.split()
    try:
        if words[0] == "wait":
            pid, status, usage = os.wait4(int(words[1]), 0)
            print(pid, os.waitstatus_to_exitcode(status), flush=True)
        elif words[0] == "poll":
            print(*os.waitpid(int(words[1]), os.WNOHANG), flush=True)
        elif words[0] == "changes":
            info = os.waitid(os.P_PID, int(words[1]), os.WSTOPPED | os.WCONTINUED | os.WEXITED | os.WNOWAIT)
            if info.si_code not in (os.CLD_EXITED, os.CLD_KILLED):
                os.waitid(os.P_PID, int(words[1]), os.WSTOPPED | os.WCONTINUED)
            print(info.si_pid, info.si_code, info.si_status, info.si_uid, flush=True)
        elif words[0] == "kill":
            os.kill(int(words[1]), int(words[2]))
            print("killed", flush=True)
        elif words[0] == "fork":
            print(fork(map(int, words[1:])), flush=True)
        elif words[0] == "any":
            print(os.wait()[0], flush=True)
        elif words[0] == "sigchld":
            print(len(got), flush=True)
            got.clear()
        elif words[0] == "exit":
            sys.exit(int(words[1]))
    except OSError as error:
        print(error.errno, flush=True)
"""


class Family:
    """A parent and its children, driven line by line."""

    def __init__(self, it, count: int = 1, user: int | None = None) -> None:
        self.it = it
        self.folder = it.mount.with_suffix(".ids")
        self.folder.mkdir(exist_ok=True)
        self.folder.chmod(0o777)
        self.process = subprocess.Popen(
            ["/usr/bin/python3", "-c", PARENT, str(count), self.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            user=user,
        )
        self.children = [int(word) for word in self.process.stdout.readline().split()]

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [self.process.pid, *self.children]:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.communicate()

    def ask(self, line: str) -> str:
        """What the parent answers."""
        print(line, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def fork(self, kept: str = "") -> int:
        """A child that is made where the parent is now."""
        self.children.append(int(self.ask(f"fork {kept}")))
        wait_until(lambda: Path(f"/proc/{self.children[-1]}/stat").exists(), "the child should have a ghost")
        return self.children[-1]

    def ids(self, child: int) -> list[int]:
        """What a child says of its parent, process group and session."""
        answer = self.folder / str(child)
        answer.unlink(missing_ok=True)
        os.kill(child, signal.SIGUSR2)
        wait_until(answer.exists, f"{child} should say its ids")
        return [int(word) for word in answer.read_text().split()]

    def move(self, pid: int, node: int) -> None:
        """Moves one of them, which must work."""
        if place_of(self.it, pid) == node:
            return
        done = echo(self.it, pid, f"nodes/{node}/migrate")
        assert done.returncode == 0, self.it.read(f"nodes/{node}/migrate").splitlines()[-1]


def place_of(it, pid: int) -> int:
    """Where it is; a process that the cluster does not know is at home."""
    return int(place(it, pid))


@pytest.fixture(scope="module")
def it(session_folder):
    with cluster(session_folder / "families", nodes=3) as made:
        yield made


def check(family: Family, user: int = 0) -> None:
    """Everything that parents and children do to each other, at their places."""
    parent, (child, *others) = family.process.pid, family.children
    assert family.ask(f"poll {child}") == "0 0"
    assert family.ids(child) == [parent, os.getpgrp(), os.getsid(0)]
    family.ask("sigchld")
    os.kill(child, 19)
    assert family.ask(f"changes {child}") == f"{child} {os.CLD_STOPPED} 19 {user}"
    os.kill(child, 18)
    assert family.ask(f"changes {child}") == f"{child} {os.CLD_CONTINUED} 18 {user}"
    assert family.ask(f"kill {child} 10") == "killed"
    assert family.ask(f"changes {child}") == f"{child} {os.CLD_KILLED} 10 {user}"
    assert family.ask(f"wait {child}") == f"{child} -10"
    assert family.ask(f"wait {child}") == "10"  # ECHILD
    assert int(family.ask("sigchld")) >= 1
    for other in others:
        assert family.ask(f"poll {other}") == "0 0"
        os.kill(other, 15)
        assert family.ask(f"wait {other}") == f"{other} -15"
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family.children), "no zombie should be left")


PLACES = list(itertools.product((MASTER, *NODES), repeat=2))
SOME = [(0, MASTER), (MASTER, 1), (0, 1), (2, 0), (1, 1)]


@pytest.mark.parametrize(("parent", "child"), PLACES if "BPFS_ROUNDS" in os.environ else [*SOME, (MASTER, 0)])
def test_a_child_that_outlives_its_parent(it, parent, child):
    with Family(it) as family:
        family.move(family.process.pid, parent)
        family.move(family.children[0], child)
        print("exit 3", file=family.process.stdin, flush=True)
        assert family.process.wait(60) == 3
        wait_until(lambda: family.ids(family.children[0])[0] == 1, "it should be init's")
        assert family.ids(family.children[0])[1:] == [os.getpgrp(), os.getsid(0)]
        os.kill(family.children[0], 9)
        wait_until(lambda: not Path(f"/proc/{family.children[0]}").exists(), "it should end")


@pytest.mark.parametrize("route", [(1, 2), (1, MASTER), (0, 1, MASTER), (1, MASTER, 1)], ids=str)
def test_a_parent_that_goes_on_and_on(it, route):
    with Family(it, 2) as family:
        for node in route:
            family.move(family.process.pid, node)
            assert family.ask(f"poll {family.children[0]}") == "0 0"
        family.move(family.children[1], 0 if route[-1] != 0 else 2)
        check(family)


def test_a_child_that_ends_on_the_way_is_not_lost(it):
    with Family(it, 3) as family:
        first, second, third = family.children
        os.kill(first, 15)  # nobody waits for it before the move
        family.move(family.process.pid, 1)
        assert family.ask(f"wait {first}") == f"{first} -15"
        os.kill(second, 9)
        assert family.ask(f"changes {second}") == f"{second} {os.CLD_KILLED} 9 0"
        family.move(family.process.pid, MASTER)
        assert family.ask(f"wait {second}") == f"{second} -9"
        os.kill(third, 1)
        assert family.ask("any") == str(third)


def test_children_of_a_lost_parent_are_inits(session_folder):
    with cluster(session_folder / "familieslost", "--lease", "2", nodes=1) as it, Family(it) as family:
        family.move(family.process.pid, 0)
        os.kill(it.pid("n0"), 9)
        assert family.process.wait(60) == -9
        (child,) = family.children
        assert Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1] == "1"
        os.kill(child, 9)


@pytest.mark.parametrize("route", [(0, 1), (0, MASTER), (0, 1, 0), (0, 1, MASTER, 0), (0, 1, 2, 0)], ids=str)
def test_a_parent_leaves_children_that_it_forked_on_a_node(it, route):
    with Family(it, 1) as family:
        family.move(family.process.pid, route[0])
        first, second, third = (family.fork() for _ in range(3))
        os.kill(third, 15)  # waited for after the moves
        for node in route[1:]:
            family.move(family.process.pid, node)
            assert family.ask(f"poll {first}") == "0 0"
            assert family.ids(first) == [family.process.pid, os.getpgrp(), os.getsid(0)]
        assert family.ask(f"wait {third}") == f"{third} -15"
        assert [place_of(it, pid) for pid in (first, second)] == [route[0]] * 2
        family.children = [first, second, family.children[0]]
        check(family)


@pytest.mark.parametrize("route", [(0, 1), (0, MASTER), (0, 1, 0), (0, MASTER, 2)], ids=str)
def test_a_child_forked_on_a_node_leaves_its_parent(it, route):
    with Family(it, 0) as family:
        family.move(family.process.pid, route[0])
        child = family.fork()
        family.fork()
        for node in route[1:]:
            family.move(child, node)
            assert family.ask(f"poll {child}") == "0 0"
            assert family.ids(child) == [family.process.pid, os.getpgrp(), os.getsid(0)]
        check(family)


def test_a_parent_whose_child_has_its_pipes_is_refused_by_name(it):
    with Family(it, 0) as family:
        family.move(family.process.pid, 0)
        child = family.fork("1")
        assert echo(it, family.process.pid, "nodes/1/migrate").returncode
        assert f"process {child}, which stays, has its fd 1, too" in it.read("nodes/1/migrate").splitlines()[-1]
        assert echo(it, child, "nodes/1/migrate").returncode
        assert "fd 1 is a pipe to another process" in it.read("nodes/1/migrate").splitlines()[-1]
        check(family)


def test_a_users_parent_leaves_its_children_and_comes_back(it):
    with Family(it, 0, user=65534) as family:
        family.move(family.process.pid, 0)
        child = family.fork()
        for node in (1, 0, MASTER, 0):
            family.move(family.process.pid, node)
            assert family.ids(child)[0] == family.process.pid
        family.move(child, 2)
        family.move(child, 0)
        check(family, 65534)


def state(pid: int) -> str:
    """The letter of its state on the master."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


@pytest.mark.parametrize(("parent", "child"), [(0, MASTER), (0, 1), (0, 0), (MASTER, 0)])
def test_a_parents_sigkill_and_sigstop_reach_its_child_elsewhere(it, parent, child):
    with Family(it, 2) as family:
        first, second = family.children
        family.move(family.process.pid, parent)
        family.move(first, child)
        family.move(second, child)
        family.ask("sigchld")
        assert family.ask(f"kill {first} 19") == "killed"
        assert family.ask(f"changes {first}") == f"{first} {os.CLD_STOPPED} 19 0"
        wait_until(lambda: state(first) == "T", "it should be stopped where it is")
        assert family.ask(f"kill {first} 18") == "killed"
        assert family.ask(f"changes {first}") == f"{first} {os.CLD_CONTINUED} 18 0"
        assert family.ids(first)[0] == family.process.pid
        assert family.ask(f"poll {first}") == "0 0"
        assert family.ask(f"kill {first} 9") == "killed"
        assert family.ask(f"wait {first}") == f"{first} -9"
        wait_until(lambda: not Path(f"/proc/{first}").exists(), "it should end where it is")
        assert family.ask(f"poll {second}") == "0 0"
        assert family.ids(second)[0] == family.process.pid


@pytest.mark.parametrize("loop", ["sleep 0.05", "sleep 0.05 & wait", "(:)"])
def test_who_forks_all_the_time_moves(it, loop):
    """Its children have its pipe; between two of them it goes. It is never refused for one that just ran."""
    script = f"trap 'exit 9' TERM; while :; do {loop}; done"
    with subprocess.Popen(["bash", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as shell:
        try:
            for node in (0, 1, MASTER) * 2:
                done = echo(it, f"{shell.pid}", f"nodes/{node}/migrate")
                assert done.returncode == 0, it.read(f"nodes/{node}/migrate")
                assert place(it, shell.pid) == str(node)
            shell.terminate()
            assert shell.wait(60) == 9
        finally:
            shell.kill()
