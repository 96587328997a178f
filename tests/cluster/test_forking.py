"""Programs that fork run on a node as at home: same output, same status, over and over."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.building import build_victims
from tests.cluster.virtual import TOP, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROUNDS = int(os.environ.get("BPFS_ROUNDS", "2"))
"""How often each program runs each way; 200 for a long look."""

VICTIMS = TOP / "tests/victims"
MAKEFILE = """
all: $(foreach n,1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20,part$(n))
	@cat part* | sort -n
part%:
	@sleep 0.01; echo $* | sed s/$$/x/ > $@
"""
SUBPROCESS = """
import subprocess
print(subprocess.run(["sort", "-r"], input="a\\nb\\n", capture_output=True, text=True).stdout)
print(subprocess.run("exit 5", shell=True).returncode, subprocess.run(["sh", "-c", "kill -9 $$"]).returncode)
pipes = [subprocess.Popen(["sh", "-c", f"sleep 0.0{n}; exit {n}"]) for n in range(8)]
print([pipe.wait() for pipe in pipes])
"""
MULTIPROCESSING = """
import multiprocessing, sys
def square(n): return n * n
if __name__ == "__main__":
    with multiprocessing.get_context("METHOD").Pool(4) as pool: print(sum(pool.map(square, range(100))))
"""

PROGRAMS = {
    "pipelines": ["bash", "-c", "seq 300 | sort -rn | tee /dev/null | head -3; false | true | (exit 3); "
                  "echo ${PIPESTATUS[*]}; x=$(seq 10 | wc -l); echo $x; (sleep 0.05; exit 4) & wait $!; exit $?"],
    "background": ["sh", "-c", "seq 5 | sort -r & wait; (exit 2) & wait $!; echo $?"],
    "make": ["make", "-s", "-j8", "-f", "Makefile", "all"],
    "xargs": ["bash", "-c", "seq 40 | xargs -P 8 -I{} true; echo $?; seq 5 | xargs -P 4 -n1 sh -c 'exit 1' -; echo $?"],
    "perl": ["perl", "-e", 'system("exit 3"); print $? >> 8, "\\n"; print `echo in`; my $p = fork // die; '
             'if (!$p) { exit 9 } waitpid($p, 0); print $? >> 8, "\\n"; exit 6'],
    "subprocess": ["/usr/bin/python3", "-c", SUBPROCESS],
    "fork": ["/usr/bin/python3", "multi_fork.py"],
    "spawn": ["/usr/bin/python3", "multi_spawn.py"],
    "c": [str(VICTIMS / "bin/forks")],
}  # fmt: skip

WAYS = {
    "onexec": 'echo "$$ onexec" > "$0" || exit 98; exec "$@"',
    "moved": 'echo $$ > "$0" || exit 98; exec "$@"',
    "whole": 'echo $$ > "$0" || exit 98; "$@"',
}


@pytest.fixture(scope="module")
def it(session_folder):
    build_victims()
    with cluster(session_folder / "forking", nodes=2) as made:
        yield made


@pytest.fixture
def folder(session_folder):
    folder = session_folder / "forking.d"
    folder.mkdir(exist_ok=True)
    (folder / "Makefile").write_text(MAKEFILE)
    for method in ("fork", "spawn"):
        (folder / f"multi_{method}.py").write_text(MULTIPROCESSING.replace("METHOD", method))
    return folder


def run(command: list[str], folder: Path) -> tuple[int, str, str]:
    """Status, stdout and stderr of a program; its files from before are gone."""
    for old in folder.glob("part*"):
        old.unlink()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_forks(it, folder, program, way):
    expected = run(PROGRAMS[program], folder)
    target = f"{it.mount}/nodes/1/migrate"
    for _ in range(ROUNDS):
        assert run(["sh", "-c", WAYS[way], target, *PROGRAMS[program]], folder) == expected
    left = lambda: [name for name in os.listdir(it.mount / "procs") if name.isdigit()]  # noqa: E731
    wait_until(lambda: left() == [], "nothing should be left")


def test_shells_that_move_themselves_at_once(it):
    # The kernel drops the name of a file that is open when the next writer of that file looks for it.
    command = ["sh", "-c", f"echo $$ > {it.mount}/nodes/1/migrate || exit 98; exit 7"]
    nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    shells = [subprocess.Popen(command, process_group=0, **nothing) for _ in range(8)]
    assert [shell.wait(60) for shell in shells] == [7] * 8
