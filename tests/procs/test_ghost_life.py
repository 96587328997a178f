"""The ghost as others see it: signals, stops, ends, and the loss of its master."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bpfs.errors import BpfsError
from bpfs.procs.ghost import (
    Adopted,
    Birth,
    ChildStopped,
    Continued,
    Ghost,
    Gone,
    Signal,
    Stopped,
    StreamLost,
    take_heir,
)
from bpfs.slave.relay import open_relay
from tests.procs.ghost_rig import OUT, end_like, ended, eventually, open_rig, read_all

NULL: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}


@pytest.mark.parametrize("code", [0, 7, 255])
async def test_exit_code(code: int) -> None:
    async with open_rig() as rig:
        ghost, process = await rig.ghost(**NULL)
        await ghost.exit(code)
        assert await ended(process) == code
        await ghost.wait_gone()
        await eventually(lambda: rig.events(ghost, Gone), "Gone is told")


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGPIPE, signal.SIGRTMIN + 3])
async def test_death_by_signal(signo: int) -> None:
    async with open_rig() as rig:
        ghost, process = await rig.ghost(**NULL)
        await ghost.killed(signo)
        assert await ended(process) == -signo


async def test_core_bit() -> None:
    # Where cores go to a program or a fixed place the ghost leaves no second one there.
    possible = (
        read_text("/proc/sys/kernel/core_pattern")[:1] not in "|/" and resource.getrlimit(resource.RLIMIT_CORE)[1]
    )
    async with open_rig() as rig:
        ghost, process = await rig.ghost(**NULL)
        await ghost.killed(signal.SIGABRT, core=True)
        result = await eventually(
            lambda: os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), "it ends"
        )
        assert result.si_code == (os.CLD_DUMPED if possible else os.CLD_KILLED)
        assert await ended(process) == -signal.SIGABRT


async def test_signals_are_forwarded_with_their_origin() -> None:
    async with open_rig() as rig:
        ghost, process = await rig.ghost(**NULL)
        for signo in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTSTP, signal.SIGCHLD, signal.SIGSEGV, signal.SIGWINCH):
            os.kill(process.pid, signo)
            wanted = Signal(signo, 0, os.getpid(), os.getuid(), 0)
            await eventually(partial(rig.told, ghost, wanted), f"{wanted} is forwarded")
        assert ghost.state() == "S"


def free_pid() -> int:
    """That of a process that has been waited for."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


async def test_a_childs_ghost_that_is_stopped_is_told_of_by_its_parents() -> None:
    """Which no program can tell of itself."""
    async with open_rig() as rig:
        ghost, process = await rig.ghost(**NULL)
        pid = free_pid()
        ours, theirs = Ghost.pair()
        with ours, theirs:
            ids = os.getpgid(process.pid), os.getsid(process.pid), os.getuid(), os.getgid()
            assert not await ghost.bear(Birth(pid, *ids, False, False, b"child", b"child\0"), theirs)
            os.kill(pid, signal.SIGSTOP)
            await eventually(partial(rig.told, ghost, ChildStopped()), "the stop is told")
            os.kill(pid, signal.SIGKILL)
            await ghost.reap(pid)
            await eventually(lambda: not os.path.exists(f"/proc/{pid}"), "it has been waited for")


async def test_stop_and_continue() -> None:
    async with open_rig() as rig:
        ghost, process = await rig.ghost(**NULL)
        for signo in (signal.SIGTSTP, signal.SIGSTOP, signal.SIGTTIN):
            await ghost.stop(signo)
            report = await eventually(
                lambda: os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG), "the parent sees the stop"
            )
            assert (report.si_code, report.si_status) == (os.CLD_STOPPED, signo)
            assert ghost.state() == "T"
            before = len(rig.events(ghost, Signal))
            await ghost.cont()
            await eventually(lambda: rig.events(ghost)[-1:] == [Continued()], "it goes on")
            assert Stopped(signo) in rig.events(ghost)
            # The master's own continue does not come back as a signal: the next one that comes is the user's.
            os.kill(process.pid, signal.SIGUSR1)
            await eventually(partial(rig.more_than, ghost, Signal, before), "the next signal")
            assert [event.signo for event in rig.events(ghost, Signal)[before:]] == [signal.SIGUSR1]  # type: ignore[union-attr]


async def test_a_users_continue_is_forwarded() -> None:
    async with open_rig() as rig:
        ghost, process = await rig.ghost(**NULL)
        await ghost.stop(signal.SIGTSTP)
        await eventually(lambda: ghost.state() == "T", "it stops")
        os.kill(process.pid, signal.SIGCONT)
        wanted = Signal(signal.SIGCONT, 0, os.getpid(), os.getuid(), 0)
        await eventually(lambda: wanted in rig.events(ghost), "SIGCONT is forwarded")
        assert ghost.state() == "S"


async def test_a_stop_from_outside_shows_in_the_state_and_an_old_stop_does_not_repeat_it() -> None:
    async with open_rig() as rig:
        ghost, process = await rig.ghost(**NULL)
        os.kill(process.pid, signal.SIGSTOP)
        await eventually(lambda: ghost.state() == "T", "it stops")
        await ghost.stop(signal.SIGSTOP)  # the node's report of the stop that follows from it
        os.kill(process.pid, signal.SIGCONT)
        await eventually(lambda: [e for e in rig.events(ghost, Signal) if e.signo == signal.SIGCONT], "forwarded")  # type: ignore[union-attr]
        await ghost.name(b"fresh")
        await eventually(lambda: comm(process.pid) == "fresh", "it runs and obeys")
        assert not rig.events(ghost, Stopped)


def read_text(path: str) -> str:
    return Path(path).read_text()


def comm(pid: int) -> str:
    return read_text(f"/proc/{pid}/comm").strip()


async def test_name_and_command_line() -> None:
    async with open_rig() as rig:
        ghost, process = await rig.ghost(name="xz -9", **NULL)
        await ghost.name(b"a-very-long-name-indeed")
        await eventually(lambda: comm(process.pid) == "a-very-long-nam", "the name is set")
        assert read_text(f"/proc/{process.pid}/cmdline") == "xz -9\0"


async def test_killed_ghost_is_noticed() -> None:
    async with open_rig() as rig:
        ghost, process = await rig.ghost(**NULL)
        process.kill()
        await ghost.wait_gone()
        assert ghost.state() == "X"


async def test_without_master_it_dies_after_the_lease() -> None:
    async with open_rig() as rig:
        _, process = await rig.ghost(lease=0, **NULL)
        assert process.poll() is None
        rig.ghosts[-1].close()
        assert await ended(process) == -signal.SIGKILL


async def test_other_descriptors_stay_open() -> None:
    read, write = os.pipe()
    async with open_rig() as rig:
        ghost, _ = await rig.ghost(keep=[write], **NULL)
        os.close(write)
        await ghost.name(b"still-here")
        await ghost.exit(0)
        assert await read_all(read) == b""
    os.close(read)


async def test_lost_stream_is_told_and_the_ghost_waits() -> None:
    async with open_rig() as rig:
        ghost, process = await rig.ghost(stdout=subprocess.PIPE)
        try:
            async with open_relay("127.0.0.1") as relay:
                ends = await rig.join(ghost, relay, OUT)
                rig.job(ends, ["sleep", "1000"])
                os.kill(relay.pid, signal.SIGKILL)
                await eventually(lambda: rig.events(ghost, StreamLost), "the loss is told")
        except* OSError:
            pass  # iorelay died, as open_relay says
        assert process.poll() is None
        await ghost.killed(signal.SIGKILL)
        assert await ended(process) == -signal.SIGKILL


async def test_the_next_master_is_told_what_came_meanwhile() -> None:
    async with open_rig() as rig:
        ghost, process = await rig.ghost(**NULL)
        for signo in (signal.SIGUSR1, signal.SIGUSR2):  # and its next one again
            ghost.close()
            os.kill(process.pid, signo)
            ghost = await rig.handle(process.pid, await Ghost.adopt(process.pid))
            await eventually(partial(rig.told, ghost, Adopted(0, False)), "it is ours")
            await eventually(partial(rig.told, ghost, Signal(signo, 0, os.getpid(), os.getuid(), 0)), "it tells")
        await ghost.exit(3)
        assert await ended(process) == 3


async def test_a_stopped_ghost_is_adopted_as_it_goes_on() -> None:
    async with open_rig() as rig:
        ghost, process = await rig.ghost(**NULL)
        os.kill(process.pid, signal.SIGSTOP)
        await eventually(lambda: ghost.state() == "T", "it is stopped")
        ghost.close()
        given_up = await Ghost.adopt(process.pid)  # by a master that dies at once
        ghost = await rig.handle(process.pid, await Ghost.adopt(process.pid))
        given_up.close()
        await ghost.exit(4)
        await ghost.cont()
        assert await ended(process) == 4
        assert not rig.events(ghost, Signal), "the SIGCONT was the master's"


async def test_output_goes_on_without_a_master() -> None:
    async with open_rig() as rig, open_relay("127.0.0.1") as relay:
        read, write = os.pipe()
        ghost, process = await rig.ghost(stdin=subprocess.DEVNULL, stdout=write)
        os.close(write)
        ends = await rig.join(ghost, relay, OUT, stream=17)
        job = rig.job(ends, ["seq", "300000"])
        ghost.close()
        ghost = await rig.handle(process.pid, await Ghost.adopt(process.pid))
        await eventually(partial(rig.told, ghost, Adopted(17, False)), "it has its stream")
        end = partial(end_like, ghost)
        rig.nursery.start_soon(_end_with, job, end)
        assert (await read_all(read)).split() == [b"%d" % n for n in range(1, 300001)]
        assert await ended(process) == 0
        os.close(read)


def test_what_is_no_ghost_is_not_adopted() -> None:
    with pytest.raises(BpfsError, match="no ghost that can be adopted"):
        take_heir(os.getpid())
    with pytest.raises(BpfsError, match="has ended"):
        take_heir(2**22 - 1)


async def _end_with(job: subprocess.Popen[bytes], end: Callable[[int], Awaitable[None]]) -> None:
    await end(await ended(job))
