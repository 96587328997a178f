"""The Python library on a real cluster; the example of its documentation runs, too."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import BrokenExecutor

import pytest

import bpfs.executor
from bpfs.aio import AsyncCluster
from bpfs.client import Cluster
from bpfs.errors import BpfsError
from bpfs.executor import NodeExecutor
from tests.cluster.virtual import cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def it(session_folder):
    with cluster(session_folder / "python", nodes=2) as made:
        yield made


# A program of its own: this one has threads and descriptors that do not move.
FORKS = """
import os, sys
from bpfs.client import Cluster
system = Cluster()
pid = system.rfork(1)
if pid == 0:
    os._exit(10 + system.current.number)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
try:
    system.rfork(7)
except KeyError as error:
    print(error)
system.nodes[1].state = "down"
try:
    system.rfork(1)
except OSError as error:
    print(error)
print(system.current.number)
system.move(0)
print(system.current.number)
"""


def test_rfork_and_move(it):
    done = subprocess.run(
        [sys.executable, "-c", FORKS], env={**os.environ, "BPFS": str(it.mount)}, capture_output=True, text=True
    )
    it.write("nodes/1/state", "up")
    it.wait_state(1, "up")
    lines = done.stdout.splitlines()
    assert done.stderr == "" and lines[0] == "11" and "no node 7" in lines[1]
    assert "node 1" in lines[2] and lines[3:] == ["-1", "0"]


def test_checkpoint_and_restart(it, tmp_path):
    system = Cluster(it.mount)
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(["sleep", "100"], **quiet) as process:
        system.procs[process.pid].checkpoint(tmp_path / "ck", stop=True)
    back = system.restart(tmp_path / "ck", 1)
    assert back.pid == process.pid and back.node == 1
    back.signal(signal.SIGTERM)
    wait_until(lambda: not os.path.exists(f"/proc/{back.pid}"), "it does not end")


def test_functions_run_on_nodes(it):
    with NodeExecutor(Cluster(it.mount), "0,1,1") as pool:
        assert list(pool.map(math.factorial, range(30))) == [math.factorial(n) for n in range(30)]
        assert {pool.submit(os.uname).result(60).nodename for _ in range(20)} <= {"n0", "n1"}
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 1, 0).result(60)
        with pytest.raises(BrokenExecutor):
            pool.submit(os._exit, 3).result(60)
        assert pool.submit(os.getpid).result(60) > 0
    with pytest.raises(RuntimeError):
        pool.submit(os.getpid)
    with pytest.raises(ValueError, match="names no node"):
        NodeExecutor(Cluster(it.mount), "down")


def test_when_all_workers_have_died(it):
    with NodeExecutor(Cluster(it.mount), "1") as pool:
        call = pool.submit(os._exit, 3)
        with pytest.raises(BrokenExecutor):
            call.result(60)
        wait_until(lambda: not pool._living, "the worker is not missed")
        with pytest.raises(BrokenExecutor, match="all workers"):
            pool.submit(os.getpid)


async def _all_of_it(mount, process) -> None:
    system = AsyncCluster(mount)
    events = system.events()
    first = asyncio.ensure_future(anext(events))
    while not first.done():  # the reader has begun when something reaches it
        await system.migrate(process.pid, 1)
        await system.migrate(process.pid, 0)
    assert str(process.pid) in str(first.result())
    ending = asyncio.ensure_future(system.wait(process.pid))
    await asyncio.to_thread(wait_until, lambda: _waits(process.pid, mount), "nobody waits")
    process.terminate()
    assert (await asyncio.wait_for(ending, 60)).signal == signal.SIGTERM
    process.wait()
    with pytest.raises(BpfsError):
        await system.migrate(process.pid, 1)
    results = [result async for result in system.run(["hostname"], "0-1")]
    assert {result.stdout for result in results} == {b"n0\n", b"n1\n"}


def test_asyncio(it):
    with subprocess.Popen(["sleep", "100"]) as process:
        try:
            asyncio.run(asyncio.wait_for(_all_of_it(it.mount, process), 100))
        finally:
            process.kill()


def _waits(pid, mount) -> bool:
    """Whether this program has the file open that tells of the end."""
    return any(
        os.path.islink(f"/proc/self/fd/{fd}") and os.readlink(f"/proc/self/fd/{fd}") == f"{mount}/procs/{pid}/wait"
        for fd in os.listdir("/proc/self/fd")
    )


def test_the_example_of_the_executor_runs(it):
    text = (bpfs.executor.__doc__ or "").split("::\n")[1].split("\nFunctions")[0]
    program = "import math\n" + "\n".join(line[4:] for line in text.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "BPFS": str(it.mount)}, capture_output=True, text=True
    )
    assert done.stdout.startswith("[") and done.stderr == ""
