"""bptop and bpps on a real cluster, looked at in a real terminal."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.desk import Terminal
from tests.cluster.virtual import TOP, VirtualCluster, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    with cluster(tmp_path_factory.mktemp("top") / "m", nodes=3) as made:
        made.write("psview", "off")  # what everybody sees then is another module's: test_psview
        yield made


@pytest.fixture
def jobs(it: VirtualCluster) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Something that sleeps on node 0, and something that computes on node 1."""
    bpsh = str(TOP / "bpfs" / "bin" / "bpsh")
    environment = {**os.environ, "BPFS": str(it.mount)}
    commands = [["0", "sleep", "1000"], ["1", "sh", "-c", "while :; do :; done"]]
    started = [subprocess.Popen([bpsh, *words], env=environment, stdin=subprocess.DEVNULL) for words in commands]
    try:
        for number, job in enumerate(started):
            wait_until(lambda n=number, j=job: (it.mount / f"nodes/{n}/procs/{j.pid}").exists(), "jobs should start")
        yield started
    finally:
        for job in started:
            job.kill()
            job.wait()


def command(it: VirtualCluster, *options: str) -> list[str]:
    return [sys.executable, "-m", "bpfs.cli.bptop", "--mount", str(it.mount), *options]


def row(text: str, pid: int) -> list[str]:
    found = re.search(rf"^ *{pid} root .*$", text, re.MULTILINE)
    return found[0].split() if found else []


def test_in_batch_mode_it_prints(it: VirtualCluster, jobs: list[subprocess.Popen[bytes]]) -> None:
    def shown(*options: str) -> str:
        run = subprocess.run(
            command(it, "-b", "-n", "1", *options), cwd=TOP, capture_output=True, text=True, timeout=100, check=False
        )
        assert (run.returncode, run.stderr) == (0, "")
        return run.stdout

    text = shown()
    assert "nodes: 3 of 3 up  processes: 2 (1 R, 1 S)" in text
    sleeps, computes = row(text, jobs[0].pid), row(text, jobs[1].pid)
    assert (sleeps[1:5], sleeps[8:]) == (["root", "0", "S", "0.0"], ["sleep", "1000"])
    assert computes[2:4] == ["1", "R"]
    assert float(computes[4]) > 1, "it computes"
    assert text.index(f" {jobs[1].pid} ") < text.index(f" {jobs[0].pid} "), "the busiest comes first"
    assert row(shown("-a"), os.getpid())[2] == "-"
    text = shown("--nodes", "0", "-o", "I")
    assert (bool(row(text, jobs[0].pid)), bool(row(text, jobs[1].pid))) == (True, False)


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed (mountscripts/check installs it)")
def test_keys_sort_move_and_kill(it: VirtualCluster, jobs: list[subprocess.Popen[bytes]], session_folder: Path) -> None:
    sleeper = jobs[0].pid
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    terminal = Terminal(session_folder / "tmux", " ".join(command(it, "-d", "0.3")), environment)
    try:
        wait_until(lambda: row(terminal.screen(), sleeper), "the processes should be shown")
        assert ">%CPU<" in terminal.screen()
        terminal.keys("N")
        wait_until(lambda: ">NODE<" in terminal.screen(), "it should be sorted by node")
        # Now the sleeper on node 0 is the first, and the chosen one.
        terminal.keys("m")
        wait_until(lambda: f"node for {sleeper} sleep 1000:" in terminal.screen(), "it should ask for the node")
        terminal.keys("9", "Enter")
        wait_until(lambda: "there is no node 9" in terminal.screen(), "it should refuse")
        terminal.keys("m", "2", "Enter")
        wait_until(lambda: f"{sleeper} is on node 2 now" in terminal.screen(), "it should move")
        wait_until(lambda: row(terminal.screen(), sleeper)[2:3] == ["2"], "it should be shown there")
        assert it.read(f"procs/{sleeper}/node") == "2\n"
        terminal.keys("k", "Enter")
        assert jobs[0].wait(60) == -15
        wait_until(lambda: not row(terminal.screen(), sleeper), "it should be gone")
        terminal.keys("q")
        wait_until(lambda: not (session_folder / "tmux").exists() or not terminal.screen(), "it should end")
    finally:
        terminal.close()


def bpps(it: VirtualCluster, *options: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "bpfs.cli.bpps", "--mount", str(it.mount), *options],
        cwd=TOP, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def test_unmodified_programs_see_what_processes_do_on_their_nodes(
    it: VirtualCluster, jobs: list[subprocess.Popen[bytes]]
) -> None:
    wait_until(lambda: float(it.read(f"procs/{jobs[1].pid}/rusage").split()[1]) > 0.2, "it should have computed")
    columns = ["-o", "pid,ppid,stat,cputimes,rss,tty,comm", "--cols", "200"]
    shown = [line.split() for line in bpps(it, *columns, "-p", f"{jobs[0].pid},{jobs[1].pid}").splitlines()[1:]]
    plain = subprocess.run(
        ["ps", *columns, "-p", f"{jobs[0].pid},{jobs[1].pid}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]
    assert [line[0] for line in shown] == ["0", "1"]
    assert [line[3][0] for line in shown] == ["S", "R"]
    for line, ghost in zip(shown, map(str.split, plain), strict=True):
        assert (line[1:3], line[6:]) == (ghost[:2], ghost[5:]), "pid, parent, terminal and name are the ghost's"
        assert int(line[5]) > int(ghost[4]), "memory is the process's"
    assert bpps(it, "--run", "cut", "-d ", "-f3", f"/proc/{jobs[1].pid}/stat") == "R\n"
    # Nothing of it is seen by others, nor left.
    assert f"/proc/{jobs[1].pid}/" not in Path("/proc/mounts").read_text()
    assert not list(Path(os.environ["TMPDIR"]).glob("bpps-*"))


def test_a_program_sees_figures_that_go_on(it: VirtualCluster, jobs: list[subprocess.Popen[bytes]]) -> None:
    stat = f"/proc/{jobs[1].pid}/stat"
    script = (
        f"first=$(cut -d' ' -f14 {stat}); until [ $(cut -d' ' -f14 {stat}) -gt $first ]; do sleep 0.1; done; echo on"
    )
    assert bpps(it, "--run", "timeout", "60", "sh", "-c", script) == "on\n"


def test_a_silent_node_keeps_nobody_waiting(it: VirtualCluster, jobs: list[subprocess.Popen[bytes]]) -> None:
    slave = it.slave(1)
    os.kill(slave, signal.SIGSTOP)
    try:
        shown = [line.split() for line in bpps(it, "-o", "pid,stat", "-p", f"{jobs[0].pid},{jobs[1].pid}").splitlines()]
    finally:
        os.kill(slave, signal.SIGCONT)
    assert [line[0] for line in shown] == ["NODE", "0", "1"]


def test_without_a_terminal_it_says_what_to_do(it: VirtualCluster) -> None:
    run = subprocess.run(command(it), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
    line = "bptop: standard input and output are no terminal (-b prints for programs and files)\n"
    assert (run.returncode, run.stdout, run.stderr) == (1, "", line)
