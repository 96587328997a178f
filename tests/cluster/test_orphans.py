"""What the kernel does on one machine when a parent or a session leader ends, done once, wherever they are."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.moving import move, place
from tests.cluster.virtual import VirtualCluster, cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MASTER = -1

# Makes a child with a group of its own, which writes down what signals it gets; says its pid, and ends with its input.
PARENT = """
import os, signal, sys
sys.stdin.readline()
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    for number in range(3):
        os.close(number)
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
    # A handler of Python's would be late for ever where the signal comes between its check and the pause.
    waited = {signal.SIGHUP, signal.SIGCONT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    os.write(log, b"ready\\n")
    while True:
        os.write(log, f"{signal.Signals(signal.sigwait(waited)).name}\\n".encode())
print(child, flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def it(session_folder: Path) -> Iterator[VirtualCluster]:
    with cluster(session_folder / "orphans", nodes=2) as made:
        yield made


def state(pid: int) -> str:
    """Of the ghost, if it is one."""
    try:
        return Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "X"


@pytest.mark.parametrize(
    ("parent", "child", "forked"),
    [(MASTER, 0, "home"), (0, 0, "there"), (0, MASTER, "home"), (0, 1, "home"), (0, 1, "there")],
)
def test_a_stopped_group_that_is_orphaned_is_hung_up_and_goes_on(
    it: VirtualCluster, tmp_path: Path, parent: int, child: int, forked: str
) -> None:
    log = tmp_path / "log"
    log.touch()
    process = subprocess.Popen(
        ["/usr/bin/python3", "-c", PARENT, log],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert process.stdin and process.stdout
    pid = 0
    try:
        if forked == "there":
            move(it, process.pid, parent)
        print(file=process.stdin, flush=True)
        pid = int(process.stdout.readline())
        wait_until(lambda: log.read_text() == "ready\n", "the child should be ready")
        wait_until(lambda: (it.mount / f"procs/{pid}/node").exists(), "it should show")
        for one, node in ((process.pid, parent), (pid, child)):
            if place(it, one) != str(node):
                move(it, one, node)
        os.kill(pid, signal.SIGSTOP)
        wait_until(
            lambda: state(pid) == "T" and (child == MASTER or it.read(f"procs/{pid}/state") == "stopped\n"), "stop"
        )
        print(file=process.stdin, flush=True)
        assert process.wait(60) == 0
        wait_until(lambda: "SIGCONT" in log.read_text(), "it should go on")
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: "SIGTERM" in log.read_text(), "it should hear the last signal")
        assert " ".join(sorted(log.read_text().split())) == "SIGCONT SIGHUP SIGTERM ready"
    finally:
        for one in (process.pid, pid):
            with suppress(ProcessLookupError):
                os.kill(one or process.pid, signal.SIGKILL)
        process.communicate()
