"""Victims, and programs of other runtimes, go to a node, on to another, and home, and find all as they left it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.building import build_victims
from tests.cluster.moving import echo, move, place
from tests.cluster.virtual import VirtualCluster, cluster
from tests.engine.moves import Victim, until
from tests.engine.test_descriptors import MOVED, SCRIPT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

VICTIMS = Path(__file__).parent.parent / "victims"
JOURNEY = (0, 1, -1)


@pytest.fixture(scope="module")
def it(session_folder: Path) -> Iterator[VirtualCluster]:
    build_victims()
    with cluster(session_folder / "journey", nodes=2) as made:
        yield made


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """So many more huge pages in the machine's pool; without them the test is skipped."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    if not pool.exists():
        pytest.skip("this kernel has no hugetlb")
    with open(Path(tempfile.gettempdir()) / "bpfs-test-huge-pages", "w") as turn:  # the pool is the machine's
        fcntl.flock(turn, fcntl.LOCK_EX)
        before = int(pool.read_text())
        try:
            pool.write_text(str(before + count))
            if int(pool.read_text()) < before + count:
                pytest.skip(f"the kernel finds no {count} huge pages")
            yield
        finally:
            pool.write_text(str(before))


def travel(it: VirtualCluster, one: Victim) -> None:
    """The whole journey, to its end at home."""
    for node in JOURNEY:
        done = echo(it, one.pid, f"nodes/{node}/migrate")
        assert done.returncode == 0, done.stderr + it.read(f"nodes/{node}/migrate") + one.text()
        assert place(it, one.pid) == str(node)
    one.stop()
    until(lambda: one.process.poll() is not None, "its end")


@pytest.mark.parametrize(
    "victim",
    ["memory", "memory-static", "memory-fixed", "signals", "state root", "shared", "shared many", "attributes",
     "births", "clocks", "settings", "switches", "robust", "inherit", "leaves home",
     "threads 1", "threads-fixed 10", "threads 10", "threads 500"],
)  # fmt: skip
def test_there_and_on_and_home(it: VirtualCluster, tmp_path: Path, victim: str) -> None:
    name, *arguments = victim.split()
    # Nothing but what it should have: descriptors above its limits could not be put back without CAP_SYS_RESOURCE.
    one = Victim(VICTIMS / "bin" / name, tmp_path, *arguments, close_fds=True)
    try:
        travel(it, one)
        assert one.process.returncode == 0, one.text()
    finally:
        one.close()


def test_vector_registers_of_a_program_that_makes_no_calls(it: VirtualCluster, tmp_path: Path) -> None:
    one = Victim(VICTIMS / "bin/fpu", tmp_path, close_fds=True)
    try:
        for node in JOURNEY:
            move(it, one.pid, node)
        os.kill(one.pid, signal.SIGUSR1)
        until(lambda: one.process.poll() is not None, "its end")
        assert one.process.returncode == 0, one.text()
    finally:
        one.close()


@pytest.mark.parametrize("how", ["", "onfault"])
def test_huge_pages_and_locks_of_what_comes_later(it: VirtualCluster, tmp_path: Path, how: str) -> None:
    with huge_pages(8):  # source and copy have four each
        test_there_and_on_and_home(it, tmp_path, f"huge {how}")


def test_without_huge_pages_there_it_runs_on(it: VirtualCluster, tmp_path: Path) -> None:
    with huge_pages(4):
        one = Victim(VICTIMS / "bin/huge", tmp_path, close_fds=True)
        try:
            done = echo(it, one.pid, "nodes/0/migrate")
            assert done.returncode == 1 and "Cannot allocate memory" in done.stderr
            assert "mapping huge pages (hugetlb)" in it.read("nodes/0/migrate")
            one.stop()
            until(lambda: one.process.poll() is not None, "its end")
            assert one.process.returncode == 0, one.text()
        finally:
            one.close()


@pytest.mark.parametrize("kind", MOVED)
def test_every_kind_of_descriptor_of_a_stopped_program(it: VirtualCluster, tmp_path: Path, kind: str) -> None:
    with (
        open(tmp_path / "log", "w+b") as log,
        subprocess.Popen(
            [sys.executable, str(SCRIPT), kind, str(tmp_path)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as process,
    ):
        try:
            os.waitpid(process.pid, os.WUNTRACED)
            for node in JOURNEY:
                done = echo(it, process.pid, f"nodes/{node}/migrate")
                assert done.returncode == 0, done.stderr + it.read(f"nodes/{node}/migrate")
                assert place(it, process.pid) == str(node)
            os.kill(process.pid, signal.SIGCONT)  # it has stayed stopped all the way
            assert process.wait(60) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()


def test_a_program_whose_file_has_been_replaced(it: VirtualCluster, tmp_path: Path) -> None:
    program = tmp_path / "own"
    shutil.copy(VICTIMS / "bin/threads", program)
    one = Victim(program, tmp_path, "3", close_fds=True)
    try:
        program.unlink()
        program.write_text("another\n")
        for node in JOURNEY:
            move(it, one.pid, node)
        assert os.readlink(f"/proc/{one.pid}/exe") == "/memfd:bpfs:own (deleted)"
        one.stop()
        until(lambda: one.process.poll() is not None, "its end")
        assert one.process.returncode == 0, one.text()
    finally:
        one.close()


ECHO = """
import os, sys
first, second = map(int, sys.argv[1:])
while line := os.read(first, 1000):
    os.write(second, line.upper())
"""


def test_pipes_to_others_at_any_number(it: VirtualCluster) -> None:
    (there, to), (back, answer) = os.pipe(), os.pipe()
    command = [sys.executable, "-c", ECHO, str(there), str(answer)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(there, answer)) as process:
        try:
            os.close(there), os.close(answer)
            for node in (*JOURNEY, 1, -1):
                os.write(to, b"before ")  # nobody reads what it says of that before it has moved
                move(it, process.pid, node)
                os.write(to, b"after.")
                said = b""
                while not said.endswith(b"."):
                    said += os.read(back, 1000)
                assert said == b"BEFORE AFTER."
            os.close(to)
            assert os.read(back, 1000) == b"" and process.wait(60) == 0
        finally:
            process.kill()
            os.close(back)


PROGRAMS = VICTIMS / "programs"


def built(language: str, folder: Path) -> list[str]:
    """The command that computes by steps in a language's runtime; its arguments: a file's name, a number of steps."""
    if language == "numpy":
        if subprocess.run(["/usr/bin/python3", "-c", "import numpy"], capture_output=True, check=False).returncode:
            pytest.skip("no NumPy for /usr/bin/python3")
        return ["/usr/bin/python3", str(PROGRAMS / "steps.py")]
    tool = {"go": "go", "java": "java"}[language]
    if not shutil.which(tool):
        pytest.skip(f"no {tool}")
    if language == "java":
        compiler = ["java", "-XX:TieredStopAtLevel=1", "-m", "jdk.compiler/com.sun.tools.javac.Main"]
        subprocess.run([*compiler, "-d", str(folder), str(PROGRAMS / "Steps.java")], check=True)
        return ["java", "-Xmx32m", "-cp", str(folder), "Steps"]
    cache = {"GOCACHE": str(folder / "cache"), "GO111MODULE": "off", "HOME": str(folder)}
    subprocess.run(
        ["go", "build", "-o", str(folder / "steps"), str(PROGRAMS / "steps.go")], check=True, env=os.environ | cache
    )
    return [str(folder / "steps")]


@pytest.mark.parametrize("language", ["numpy", "go", "java"])
def test_a_runtime_computes_the_same_on_the_way(it: VirtualCluster, tmp_path: Path, language: str) -> None:
    command = built(language, tmp_path)
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "4"}
    stop = tmp_path / "stop"
    one = Victim(Path(command[0]), tmp_path, command=[*command, str(stop)], env=environment)
    try:
        travel(it, one)
        steps = one.text().split()[0]
        unmoved = subprocess.run(
            [*command, str(tmp_path / "other"), steps], env=environment, capture_output=True, text=True, check=True
        )
        assert one.text() == unmoved.stdout and one.text().endswith(("true\n", "True\n"))
    finally:
        one.close()
