# SPDX-License-Identifier: GPL-2.0-or-later
"""One process that runs on a node from its next exec on: the node makes that exec itself, by order, where that can be;
else the process moves there. Nobody sees which it was, whatever breaks on the way.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.held import holding, kill_workers
from tests.cluster.moving import place, processes_of
from tests.cluster.virtual import TOP, VirtualCluster, bpcluster, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("open_gates")]

BPSH = str(TOP / "bpfs" / "bin" / "bpsh")
AN_ORDER = range(1, 12_000)  # bytes; the image of a process at its exec has more


@pytest.fixture(scope="module")
def it(session_folder: Path, gates: Path) -> Iterator[VirtualCluster]:
    with holding(gates), cluster(session_folder / "orders", "--lease", "6", nodes=2) as made:
        yield made


def started(it: VirtualCluster, *words: str, **more: Any) -> subprocess.Popen[str]:
    """A command that has begun; what it says can be read."""
    return subprocess.Popen(
        [*words], env={**os.environ, "BPFS": str(it.mount)}, text=True,
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
    )  # fmt: skip


def ended(it: VirtualCluster, *words: str, **more: Any) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    process = started(it, *words, **more)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def last(it: VirtualCluster, node: int = 1) -> dict[str, str]:
    """The last line of the node's migrate file: pid, outcome and figures."""
    pid, outcome, *more = it.read(f"nodes/{node}/migrate").splitlines()[-1].split()
    return {"pid": pid, "outcome": outcome} | dict(word.split("=") for word in more if "=" in word)


def was_ordered(it: VirtualCluster) -> bool:
    figures = last(it)
    assert figures["outcome"] == "ok"
    return int(figures["bytes"]) in AN_ORDER


def test_a_command_is_started_by_order(it: VirtualCluster) -> None:
    assert ended(it, BPSH, "1", "sh", "-c", "uname -n; echo $PPID >&2; exit 3") == (3, "n1\n", f"{os.getpid()}\n")
    assert was_ordered(it)
    assert ended(it, BPSH, "1", "sh", "-c", "kill -TERM $$")[0] == -signal.SIGTERM


def test_a_shell_may_ask_for_it_as_well(it: VirtualCluster) -> None:
    script = f"echo $$ onexec > {it.mount}/nodes/1/migrate && exec sh -c 'uname -n; cat'"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.communicate("word\n", timeout=60)[0] == "n1\nword\n"
    assert was_ordered(it)


def keep_a_signal() -> None:
    """One is pending when it execs: no exec could bring that about elsewhere."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    os.kill(os.getpid(), signal.SIGUSR1)


LOOK = "import signal; print(*(one.name for one in signal.sigpending()))"


def test_what_no_exec_brings_about_moves(it: VirtualCluster) -> None:
    words = [BPSH, "1", "/usr/bin/python3", "-Sc", LOOK]
    assert ended(it, *words, preexec_fn=keep_a_signal) == (0, "SIGUSR1\n", "")
    assert not was_ordered(it)


def test_a_file_that_it_has_open_goes_along(it: VirtualCluster, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("one\ntwo\n")
    with path.open() as file:
        assert ended(it, BPSH, "1", "bash", "-c", f"cat <&{file.fileno()}", pass_fds=[file.fileno()]) == (
            0, "one\ntwo\n", ""
        )  # fmt: skip
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == len("one\ntwo\n")


WAITS = "import os; print(os.wait()[1])"


def test_its_child_is_its_child_there(it: VirtualCluster) -> None:
    script = f"sleep 0.3 & echo $$ onexec > {it.mount}/nodes/1/migrate; exec /usr/bin/python3 -Sc '{WAITS}'"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.communicate(timeout=60)[0] == "0\n"


def test_many_at_once_each_do_what_they_should(it: VirtualCluster) -> None:
    running = [started(it, BPSH, "1", "sh", "-c", f"echo {number}; exit {number}") for number in range(30)]
    for number, process in enumerate(running):
        assert process.communicate(timeout=60) == (f"{number}\n", "")
        assert process.returncode == number


def held(it: VirtualCluster, gates: Path, phase: str, *words: str) -> tuple[subprocess.Popen[str], Path]:
    """A command that is held before its order is given to the node, or before its ghost is made."""
    gate = gates / phase
    gate.touch()
    process = started(it, BPSH, "1", *words)
    reached = gate.with_suffix(".reached")
    wait_until(reached.exists, f"it should reach {phase}")
    reached.unlink()
    return process, gate


PHASES = ["order", "ordered"]
SAYS = ("sh", "-c", "echo here; exec sleep 1000")


def expect_end(it: VirtualCluster, process: subprocess.Popen[str], *codes: int) -> str:
    """It has ended so, and there is nothing of it anywhere. Returns what it has said on standard error."""
    _, err = process.communicate(timeout=60)
    assert process.returncode in codes, err
    wait_until(lambda: not processes_of(it, process.pid), f"left over: {processes_of(it, process.pid)}")
    return err


@pytest.mark.parametrize("phase", PHASES)
def test_its_worker_dies(it: VirtualCluster, gates: Path, phase: str) -> None:
    process, gate = held(it, gates, phase, *SAYS)
    kill_workers(it.pid("master"))
    gate.unlink()
    expect_end(it, process, -signal.SIGKILL)


@pytest.mark.parametrize("phase", PHASES)
def test_it_is_killed(it: VirtualCluster, gates: Path, phase: str) -> None:
    process, gate = held(it, gates, phase, *SAYS)
    process.kill()
    gate.unlink()
    expect_end(it, process, -signal.SIGKILL)


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_on_the_way_reaches_it(it: VirtualCluster, gates: Path, phase: str) -> None:
    catch = "import signal; signal.sigwait([signal.SIGUSR1]); print('heard')"
    block = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]);"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    gate = gates / phase
    gate.touch()
    process = started(it, sys.executable, "-c", block, BPSH, "1", "/usr/bin/python3", "-Sc", catch)
    reached = gate.with_suffix(".reached")
    wait_until(reached.exists, f"it should reach {phase}")
    reached.unlink()
    process.send_signal(signal.SIGUSR1)
    gate.unlink()
    assert process.communicate(timeout=60)[0] == "heard\n"


@pytest.mark.parametrize("phase", PHASES)
def test_its_slave_dies(it: VirtualCluster, gates: Path, phase: str) -> None:
    process, gate = held(it, gates, phase, *SAYS)
    os.kill(it.slave(1), signal.SIGKILL)
    gate.unlink()
    wait_until(lambda: it.read("nodes/1/state").strip() == "up", "the node should be back")
    # It has got there before the link broke, or it has not.
    wait_until(lambda: process.poll() is not None or place(it, process.pid) == "1", "it should be there, or ended")
    process.kill()
    err = expect_end(it, process, -signal.SIGKILL, 125)
    assert process.returncode != 125 or "cannot run on node 1" in err


@pytest.mark.parametrize("phase", PHASES)
def test_its_master_dies(it: VirtualCluster, gates: Path, phase: str) -> None:
    process, gate = held(it, gates, phase, *SAYS)
    os.kill(it.pid("master"), signal.SIGKILL)
    gate.unlink()
    assert process.wait(60) == -signal.SIGKILL
    done = bpcluster("restart-master", mount=it.mount)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: it.read("status").split().count("up") == 2, "all nodes should be back")
    expect_end(it, process, -signal.SIGKILL)
    assert ended(it, BPSH, "1", "true")[0] == 0
