"""A real bpslave, in no namespace of its own, under a master in this process: job space, engine, signals, fences."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from errno import EBADF, EEXIST, EINVAL, ENOENT, EOPNOTSUPP, ESRCH
from pathlib import Path

import msgpack
import pytest
import trio

from bpfs.errors import RemoteError
from bpfs.nodes.registry import Node
from bpfs.nodes.states import NodeState
from bpfs.rundir import process_start
from bpfs.slave import machine
from bpfs.wire.messages import (
    EngineCall,
    EngineClose,
    EngineOpen,
    FdClose,
    Fence,
    HostPidOf,
    JobReport,
    JobStatus,
    KillAll,
    ReadClock,
    SetClock,
    Signal,
    SlewClock,
)
from tests.cluster.virtual import children, comm, kill, living
from tests.nodes.simslave import KEY, Master, master

pytestmark = pytest.mark.slow

TOP = Path(__file__).parents[2]


class RealSlave:
    """A running bpslave."""

    def __init__(self, it: Master, process: subprocess.Popen, log: Path, reports: list[JobReport]) -> None:
        self.it = it
        self.process = process
        self.log = log
        self.reports = reports
        self.killed = False  # by kill -9 of the supervisor: what is left then ends in its own time

    @property
    def node(self) -> Node:
        return self.it.cluster.nodes.get(0)

    @property
    def life(self) -> int:
        return next((pid for pid in children(self.process.pid) if comm(pid) == "bpslave"), 0)

    async def request(self, message):
        """Asks the slave."""
        return await self.node.live_session().link.request(message, 30)

    async def engine(self, session: int, op: str, **args):
        """One call of an engine session; gives the worker's reply."""
        reply = await self.request(EngineCall(session, msgpack.packb({"op": op, **args})))
        return msgpack.unpackb(reply.body)

    def start_job(self, *command: str) -> int:
        """Starts a process in the job space, as a child of the space's init; gives its job pid."""
        code = """
import os, sys
from bpfs import kernel
kernel.setns(os.open(f"/proc/{sys.argv[1]}/ns/pid", os.O_RDONLY), kernel.CLONE_NEWPID)
if not os.fork():
    if os.fork():
        os._exit(0)
    os.setsid()
    with open(f"/proc/self/status") as file:
        print(next(line for line in file if line.startswith("NSpid")).split()[-1], flush=True)
    os.close(1)
    os.execvp(sys.argv[2], sys.argv[2:])
os.wait()
"""
        started = subprocess.run(
            [sys.executable, "-c", code, str(self.node.init), *command], cwd=TOP, stdout=subprocess.PIPE, check=True
        )
        return int(started.stdout)

    async def wait_report(self, pid: int) -> JobReport:
        """The first report on a job."""
        with trio.fail_after(60):
            while True:
                for report in self.reports:
                    if report.pid == pid:
                        self.reports.remove(report)
                        return report
                await trio.sleep(0.005)


def start_python(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *arguments], cwd=TOP, stdin=subprocess.DEVNULL)


def _state(pid: int) -> str:
    return process_start(pid)[0]


@asynccontextmanager
async def real_slave(tmp_path: Path, **settings):
    """A master here, and a slave that is up."""
    key, log = tmp_path / "key", tmp_path / "log"
    key.write_bytes(KEY)
    key.chmod(0o600)
    async with master(**settings) as it:
        reports: list[JobReport] = []
        it.cluster.handle(JobReport, lambda node, message: reports.append(message))
        command = ["-m", "bpfs.cli.bpslave", f"127.0.0.1:{it.port}", "--key", str(key), "--number", "0"]
        process = start_python([*command, "--no-mount", "--foreground", "--log", str(log)])
        try:
            with trio.fail_after(60):
                await it.wait_state(0, "up")
            slave = RealSlave(it, process, log, reports)
            pids = {process.pid, slave.life, *children(slave.life), slave.node.init}
            everybody = {pid: process_start(pid)[1] for pid in pids}
            yield slave
            process.terminate()
            with trio.fail_after(60):
                while process.poll() is None:
                    await trio.sleep(0.01)
            assert process.returncode == (-signal.SIGKILL if slave.killed else 0)
            assert slave.killed or living(everybody) == []
            with trio.fail_after(60):
                while living(everybody):
                    await trio.sleep(0.01)
        finally:
            process.kill()
            process.wait()


async def test_jobs_are_seen_signalled_and_reported(tmp_path):
    async with real_slave(tmp_path) as slave:
        job = slave.start_job("sleep", "1000")
        hostpid = (await slave.request(HostPidOf(job))).hostpid
        assert comm(hostpid) == "sleep"
        (stat, cmdline) = (await slave.request(JobStatus(job, ("stat", "cmdline")))).texts
        # By the pid that the cluster knows it by.
        assert stat.startswith(b"%d (sleep)" % job) and cmdline == b"sleep\x001000\0"
        await slave.request(Signal(job, signal.SIGSTOP, 0, 0, 0, 0))
        report = await slave.wait_report(job)
        assert (report.code, report.status, report.reporter) == (os.CLD_STOPPED, signal.SIGSTOP, 1)
        await slave.request(Signal(job, signal.SIGCONT, 0, 0, 0, 0))
        assert (await slave.wait_report(job)).code == os.CLD_CONTINUED
        await slave.request(Signal(job, signal.SIGTERM, 0, 0, 0, 0))
        report = await slave.wait_report(job)
        assert (report.code, report.status) == (os.CLD_KILLED, signal.SIGTERM)
        exiting = slave.start_job("sh", "-c", "exit 3")
        report = await slave.wait_report(exiting)
        assert (report.code, report.status) == (os.CLD_EXITED, 3)
        assert (await slave.request(HostPidOf(job))).hostpid == 0
        for message, code in (
            (Signal(job, 15, 0, 0, 0, 0), ESRCH), (JobStatus(job, ("stat",)), ESRCH), (JobStatus(1, ("mem",)), EINVAL)
        ):  # fmt: skip
            with pytest.raises(RemoteError) as caught:
                await slave.request(message)
            assert caught.value.errno == code


async def test_kill_all_leaves_the_job_space(tmp_path):
    async with real_slave(tmp_path) as slave:
        init = slave.node.init
        jobs = [slave.start_job("sleep", "1000") for _ in range(5)]
        await slave.request(KillAll())
        for job in jobs:
            assert (await slave.wait_report(job)).status == signal.SIGKILL
        assert slave.node.init == init and slave.it.state(0) == "up"


async def test_engine_sessions_pass_through(tmp_path):
    async with real_slave(tmp_path) as slave:
        job = slave.start_job("sleep", "1000")
        hostpid = (await slave.request(HostPidOf(job))).hostpid
        await slave.request(EngineOpen(7))
        assert (await slave.engine(7, "freeze", pid=hostpid, writing=False))["ok"]
        assert (await slave.engine(7, "inspect"))["process"]["comm"] in ("sleep", b"sleep")
        assert not (await slave.engine(7, "nonsense"))["ok"]
        with pytest.raises(RemoteError) as caught:
            await slave.request(EngineOpen(7))
        assert caught.value.errno == EEXIST
        with pytest.raises(RemoteError) as caught:
            await slave.engine(8, "inspect")
        assert caught.value.errno == ENOENT
        with pytest.raises(RemoteError) as caught:
            await slave.request(EngineCall(7, b"", (99,)))
        assert caught.value.errno == EBADF
        link = slave.node.live_session().link
        link.notify_nowait(FdClose((99,)))
        link.notify_nowait(EngineClose(7))
        with trio.fail_after(60):
            while _state(hostpid) == "t":
                await trio.sleep(0.005)
        with pytest.raises(RemoteError) as caught:
            await slave.engine(7, "inspect")
        assert caught.value.errno == ENOENT


async def test_a_fence_ends_every_job_before_it_is_answered(tmp_path):
    async with real_slave(tmp_path) as slave:
        # One that forks all the time, one that ignores what can be ignored, one that is stopped.
        slave.start_job("sh", "-c", "while :; do sleep 0.001; done")
        slave.start_job("sh", "-c", "trap '' TERM HUP INT; while :; do sleep 1000; done")
        stopped = slave.start_job("sleep", "1000")
        await slave.request(Signal(stopped, signal.SIGSTOP, 0, 0, 0, 0))
        init, life, node = slave.node.init, slave.life, slave.node
        with _held_namespace(init) as namespace:
            await slave.it.cluster.administrator.set_state(node, NodeState.DOWN)
            assert not node.doubtful and _in_namespace(namespace) == []
        await slave.it.cluster.administrator.set_state(node, NodeState.UP)
        assert slave.life not in (0, life) and node.init not in (0, init)


@contextmanager
def _held_namespace(init: int) -> Iterator[str]:
    """The pid namespace of a process, held: else the kernel gives its number to the next one, anybody's, once dead."""
    held = os.open(f"/proc/{init}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield os.readlink(f"/proc/{init}/ns/pid")
    finally:
        os.close(held)


def _in_namespace(namespace: str) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.readlink(f"/proc/{name}/ns/pid") == namespace:
                    found.append(int(name))
            except OSError:
                pass
    return found


@pytest.mark.parametrize("victim", ["init", "life"])
async def test_what_is_killed_comes_back_afresh(tmp_path, victim):
    async with real_slave(tmp_path) as slave:
        slave.start_job("sleep", "1000")
        life, init, node = slave.life, slave.node.init, slave.node
        with _held_namespace(init) as namespace:
            kill(init)
            if victim == "life":
                kill(life)
            with trio.fail_after(60):
                await slave.it.wait_state(0, "down")
                await slave.it.wait_state(0, "up")
            assert slave.life not in (0, life) and node.init not in (0, init)
            assert _in_namespace(namespace) == []


async def test_the_end_of_the_supervisor_is_the_end_of_all(tmp_path):
    async with real_slave(tmp_path) as slave:
        job = slave.start_job("sleep", "1000")
        hostpid = (await slave.request(HostPidOf(job))).hostpid
        inner = {pid: process_start(pid)[1] for pid in (slave.life, slave.node.init, hostpid)}
        kill(slave.process.pid)
        with trio.fail_after(60):
            await slave.it.wait_state(0, "down")
            while living(inner):
                await trio.sleep(0.005)
        slave.process.wait()
        slave.killed = True


async def test_halt_ends_a_slave_that_is_no_real_node(tmp_path):
    assert not machine.is_real_node()
    async with real_slave(tmp_path) as slave:
        await slave.it.cluster.administrator.set_state(slave.node, NodeState.HALT)
        with trio.fail_after(60):
            while slave.process.poll() is None:
                await trio.sleep(0.01)
        assert slave.process.returncode == 0 and slave.it.state(0) == "down"


async def test_the_clock_and_nonsense_are_refused(tmp_path):
    assert not machine.is_real_node()
    async with real_slave(tmp_path) as slave:
        with pytest.raises(RemoteError) as caught:
            await slave.request(SetClock(0))
        assert caught.value.errno == EOPNOTSUPP
        with pytest.raises(RemoteError) as caught:
            await slave.request(SlewClock(1000))
        assert caught.value.errno == EOPNOTSUPP
        before = time.time_ns()
        assert before <= (await slave.request(ReadClock())).realtime_ns <= time.time_ns()
        with pytest.raises(RemoteError):
            await slave.request(Fence("why", "format the disk"))
        assert slave.it.state(0) == "up"


def test_nothing_here_can_end_this_machine(tmp_path, monkeypatch):
    """All four conditions are needed; this machine lacks them, and a forged mark does not help."""
    assert not machine.is_real_node()
    mark = tmp_path / "mark"
    mark.write_text(Path("/proc/sys/kernel/random/boot_id").read_text())
    mark.chmod(0o400)
    monkeypatch.setattr(machine, "MARK", mark)
    assert not machine.is_real_node()
    for how in ("reboot", "halt", "pwroff"):
        with pytest.raises(OSError, match="this is no real node"):
            machine.end(how)
    with pytest.raises(OSError, match="this is no real node"):
        machine.set_clock(0)
