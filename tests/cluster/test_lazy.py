"""Post-copy: a process runs at its new place before its memory is there."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.linux import procfs, userfaultfd
from tests.building import build_victims
from tests.cluster.held import holding, kill_workers
from tests.cluster.moving import echo, place, processes_of
from tests.cluster.virtual import VirtualCluster, cluster, set_link, wait_until
from tests.engine.moves import Victim, until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(not userfaultfd.answers(), reason="this kernel has no userfaultfd with all events"),
]

WRITER = Path(__file__).parent.parent / "victims" / "bin" / "writer"
ROUTES = [(-1, 0), (0, 1), (1, -1)]
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def it(session_folder: Path, gates: Path) -> Iterator[VirtualCluster]:
    build_victims()
    with holding(gates), cluster(session_folder / "lazy", "--lease", "3", "--netns", nodes=2) as made:
        yield made


@pytest.fixture
def gate(gates: Path) -> Iterator[Path]:
    """While it is there, only pages that somebody waits for are sent."""
    gate = gates / "owed"
    gate.touch()
    yield gate
    gate.unlink(missing_ok=True)
    gate.with_suffix(".reached").unlink(missing_ok=True)


@contextmanager
def writing(folder: Path, *how: str) -> Iterator[Victim]:
    one = Victim(WRITER, folder, *how, close_fds=True)
    try:
        yield one
    finally:
        one.close()


def move(it: VirtualCluster, one: Victim, node: int, how: str = " lazy") -> None:
    done = echo(it, f"{one.pid}{how}", f"nodes/{node}/migrate")
    assert done.returncode == 0, done.stderr + it.read(f"procs/{one.pid}/history") + one.text()
    assert place(it, one.pid) == str(node)


def owes(it: VirtualCluster, one: Victim, route: tuple[int, int]) -> None:
    """It has come this way, and memory is to come that nobody sends."""
    if route[0] != -1:
        move(it, one, route[0], "")
    move(it, one, route[1])
    assert re.fullmatch(r"running: \d+ of \d+ MB to come\n", it.read(f"procs/{one.pid}/state"))


def history(it: VirtualCluster, one: Victim) -> str:
    """Of one that has ended, too; at home that takes a moment."""
    try:
        return it.read(f"procs/{one.pid}/history")
    except FileNotFoundError:
        return ""


def has_all(it: VirtualCluster, one: Victim) -> bool:
    return it.read(f"procs/{one.pid}/state") == "running\n"


def end(one: Victim) -> None:
    one.stop()
    until(lambda: one.process.poll() is not None, "its end")
    assert one.process.returncode == 0, one.text()


def waits_for_memory(it: VirtualCluster, pid: int) -> bool:
    for line in processes_of(it, pid):
        vmas = procfs.parse_smaps(procfs.read(f"/proc/{line.split()[0]}/smaps"))
        if any("um" in vma.flags for vma in vmas):
            return True
    return False


@pytest.mark.parametrize("how", ["96 4", "24 4 churn threads"])
def test_there_and_on_and_home(it: VirtualCluster, tmp_path: Path, how: str) -> None:
    with writing(tmp_path, *how.split()) as one:
        for node in (0, 1, -1):  # each waits for what the one before has left to come
            move(it, one, node)
        until(lambda: has_all(it, one), "all of its memory")
        assert not waits_for_memory(it, one.pid)
        sizes = [int(line.rpartition("=")[2]) for line in it.read(f"procs/{one.pid}/history").splitlines()]
        assert min(sizes[1:]) > int(how.split()[0]) << 20
        end(one)


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_all_that_is_touched_comes_and_the_memory_may_change(
    it: VirtualCluster, gate: Path, tmp_path: Path, route: tuple[int, int]
) -> None:
    with writing(tmp_path, "8", "2", "churn", "forks", "threads") as one:
        owes(it, one, route)
        end(one)  # it looks at every page
        until(lambda: not processes_of(it, one.pid), "nothing of it should be left")


# Does what it is told, a word a line, with memory that it has not touched since it began.
OBEDIENT = """
import hashlib, os, sys
memory = bytearray(os.urandom(16 << 20))
digest = hashlib.sha256(memory).digest()
print("ready", flush=True)
for word in sys.stdin:
    if word == "write\\n":
        copy = os.memfd_create("copy")
        assert os.write(copy, memory) == len(memory)
        print(hashlib.sha256(os.pread(copy, len(memory), 0)).digest() == digest, flush=True)
        os.close(copy)
    elif word == "exec\\n":
        os.execv("/bin/sh", ["sh", "-c", "echo new; read line; exit 5"])
    else:
        sys.exit(3)
"""


@contextmanager
def obeying(user: int) -> Iterator[subprocess.Popen[str]]:
    command = ["/usr/bin/python3", "-c", OBEDIENT]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, user=user, group=user,
        extra_groups=[], cwd="/", env={},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{word}\n")
    return process.stdout.readline()


@pytest.mark.parametrize("user", [0, 65534])
@pytest.mark.parametrize("route", ROUTES[::2], ids=str)
def test_system_calls_another_program_and_the_end(
    it: VirtualCluster, gate: Path, route: tuple[int, int], user: int
) -> None:
    with obeying(user) as process:
        if route[0] != -1:
            assert echo(it, process.pid, f"nodes/{route[0]}/migrate").returncode == 0
        done = echo(it, f"{process.pid} lazy", f"nodes/{route[1]}/migrate")
        assert done.returncode == 0, done.stderr + it.read(f"nodes/{route[1]}/migrate")
        assert it.read(f"procs/{process.pid}/state").endswith(" to come\n")
        if user:
            assert tell(process, "write") == "True\n"
            assert tell(process, "end") == ""
            assert process.wait(30) == 3
        else:
            assert tell(process, "exec") == "new\n"
            gate.unlink()  # the first page that is given tells that nobody is there any more
            wait_until(lambda: it.read(f"procs/{process.pid}/state") == "running\n", "nothing is to come any more")
            assert tell(process, "end") == ""
            assert process.wait(30) == 5


def test_what_else_is_asked_of_it_waits(it: VirtualCluster, gate: Path, tmp_path: Path) -> None:
    with writing(tmp_path, "16", "1") as one:
        owes(it, one, (-1, 0))
        assert "its memory is not all there" in it.read(f"procs/{one.pid}/cantmove")
        assert "No such process" in echo(it, "cancel", f"procs/{one.pid}/node").stderr
        words = [f"{one.pid} > nodes/1/migrate", f"{tmp_path}/image > procs/{one.pid}/checkpoint"]
        asking = [subprocess.Popen(["bash", "-c", f"cd {it.mount}; echo {word}"]) for word in words]
        one.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: it.read(f"procs/{one.pid}/state").startswith("stopped: "), "it should stop")
        one.process.send_signal(signal.SIGCONT)
        assert [process.poll() for process in asking] == [None, None]
        gate.unlink()
        codes = [process.wait(60) for process in asking]
        assert 0 in codes  # whoever came second may have met the other: EBUSY
        wait_until(lambda: has_all(it, one), "all of its memory")
        end(one)


@pytest.mark.parametrize("who", ["source", "destination"])
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_an_engine_is_killed(
    it: VirtualCluster, gate: Path, tmp_path: Path, route: tuple[int, int], who: str
) -> None:
    with writing(tmp_path, "64", "1", "churn", "forks") as one:
        owes(it, one, route)
        where = route[who == "destination"]
        kill_workers(it.pid("master") if where == -1 else it.slave(where))
        assert one.process.wait(30) == KILLED, one.text()
        wait_until(lambda: "was lost on the way" in history(it, one), "the reason")
        last = history(it, one).splitlines()[-1]
        origin = "the master" if route[0] == -1 else f"node {route[0]}"
        assert re.match(rf"signal 9: its memory was lost on the way from {origin}, \d+ of \d+ MB to come: ", last)
        assert it.read(f"procs/{one.pid}/state") == "ended\n"
        wait_until(lambda: not processes_of(it, one.pid), "nothing of it should be left")
        assert echo(it, f"{one.pid} lazy", "nodes/0/migrate").returncode != 0


def test_the_link_to_the_source_is_cut(it: VirtualCluster, gate: Path, tmp_path: Path) -> None:
    with writing(tmp_path, "64", "1") as one:
        owes(it, one, (0, 1))
        set_link(it.leg(0), up=False)
        try:
            assert one.process.wait(60) == KILLED, one.text()
            wait_until(lambda: "from node 0" in history(it, one), "the reason")
        finally:
            set_link(it.leg(0), up=True)
        it.wait_state(0, "up")
        wait_until(lambda: not processes_of(it, one.pid), "nothing of it should be left")


def test_small_ones_move_as_ever(it: VirtualCluster, gate: Path, tmp_path: Path) -> None:
    with writing(tmp_path, "1", "1") as one:
        move(it, one, 0)
        assert it.read(f"procs/{one.pid}/state") == "running\n"
        end(one)


def test_nonsense(it: VirtualCluster) -> None:
    for words in ("lazy lazy", "lazy onexec", "lazily"):
        with pytest.raises(OSError) as caught:
            (it.mount / "nodes/0/migrate").write_text(f"{os.getpid()} {words}")
        assert caught.value.errno == errno.EINVAL
