"""Real ghosts, real iorelays and ordinary processes in the place of moved jobs."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

from bpfs.procs import ghost as ghosts
from bpfs.procs.ghost import Event, Ghost, Gone, Signal
from bpfs.slave.relay import Ends, Relay, make_ends

PYTHON = [sys.executable, "-I", "-S", "-c"]
VICTIMS = Path(__file__).resolve().parent.parent / "victims"
DEADLINE = 60.0  # seconds; a machine under load is slow, never wrong


async def eventually(check: Callable[[], Any], what: str) -> Any:
    """Polls until `check` returns something true, and returns that."""
    with trio.move_on_after(DEADLINE):
        while not (value := check()):
            await trio.sleep(0.005)
        return value
    raise AssertionError(f"never came true: {what}")


async def ended(process: subprocess.Popen[bytes]) -> int:
    """The return code (negative: the signal)."""
    await eventually(lambda: process.poll() is not None, f"{process.args!r} ends")
    return process.returncode


def external(fd: int, kind: str, access: int, fds: Sequence[int] = ()) -> dict[str, Any]:
    """An External as the engine makes them."""
    return {"key": fd, "fds": list(fds) or [fd], "kind": kind, "access": access, "flags": access, "stdio": True,
            "termios": None, "winsize": None}  # fmt: skip


PIPES = [external(0, "pipe", os.O_RDONLY), external(1, "pipe", os.O_WRONLY), external(2, "pipe", os.O_WRONLY)]
IN_OUT = PIPES[:2]
OUT = [PIPES[1]]


class TerminalJob:
    """A job below victims/placeholder.py."""

    def __init__(self, reports: int, leader: subprocess.Popen[bytes]) -> None:
        self.pid = 0
        self.returncode: int | None = None
        self.leader = leader
        self._reports = reports
        self._text = b""
        os.set_blocking(reports, False)

    def look(self) -> tuple[int, int] | None:
        """The next change: si_code and si_status."""
        try:
            self._text += os.read(self._reports, 4096)
        except BlockingIOError:
            pass
        line, found, rest = self._text.partition(b"\n")
        if not found:
            return None
        self._text = rest
        words = [int(word) for word in line.split()]
        if not self.pid:
            self.pid = words[0]
            return self.look()
        code, status = words
        if code not in (os.CLD_STOPPED, os.CLD_CONTINUED):
            self.returncode = status if code == os.CLD_EXITED else -status
            os.close(self._reports)
        return code, status

    def send_signal(self, signo: int) -> None:
        """To the job itself."""
        try:
            os.kill(self.pid, signo)
        except ProcessLookupError:
            pass  # ended; the report is on its way


class Rig:
    """Starts things and ends them all."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.processes: list[subprocess.Popen[bytes]] = []
        self.log: dict[int, list[Event]] = {}
        self.ghosts: list[Ghost] = []

    def popen(self, args: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """A process that is killed at the end of the test."""
        process = subprocess.Popen(args, **options)
        self.processes.append(process)
        return process

    @contextmanager
    def control(self) -> Iterator[tuple[socket.socket, int]]:
        """Our end of a control socket, and the number to inherit for the other."""
        ours, theirs = Ghost.pair()
        number = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD, 200)
        theirs.close()
        try:
            yield ours, number
        finally:
            os.close(number)

    async def ghost(
        self, *, lease: int = 30, name: str = "job", keep: Sequence[int] = (), **options: Any
    ) -> tuple[Ghost, subprocess.Popen[bytes]]:
        """A ghost as our child."""
        with self.control() as (ours, number):
            env = {**os.environ, "BPFS_CONTROL": str(number), "BPFS_LEASE": str(lease)}
            env["BPFS_HEIR"] = ghosts.ROOM_FOR_HEIR.removeprefix(ghosts.HEIR).decode()
            process = self.popen([name], executable=ghosts.EXECUTABLE, env=env, pass_fds=[number, *keep], **options)
        return await self.handle(process.pid, ours), process

    async def handle(self, pid: int, ours: socket.socket | Ghost) -> Ghost:
        """A handle whose events are collected in `log`."""
        ghost = ours if isinstance(ours, Ghost) else Ghost(pid, ours)
        self.nursery.start_soon(ghost.run)
        self.log[id(ghost)] = events = []
        self.ghosts.append(ghost)

        async def collect() -> None:
            async for event in ghost.events:
                events.append(event)

        self.nursery.start_soon(collect)
        await ghost.wait_ready(DEADLINE)
        return ghost

    def events(self, ghost: Ghost, kind: type[Event] | None = None) -> list[Event]:
        """What the ghost has told so far."""
        return [event for event in self.log[id(ghost)] if kind is None or isinstance(event, kind)]

    def told(self, ghost: Ghost, event: Event) -> bool:
        """Whether it has told this."""
        return event in self.log[id(ghost)]

    def more_than(self, ghost: Ghost, kind: type[Event], number: int) -> bool:
        """Whether it has told more than that many of a kind."""
        return len(self.events(ghost, kind)) > number

    async def join(self, ghost: Ghost, relay: Relay, externals: Sequence[dict[str, Any]], stream: int = 1) -> Ends:
        """Joins a ghost to a relay; the returned ends are for the job."""
        ends = make_ends(externals)
        token = relay.expect(stream, ends)
        connection = await ghosts.connect_stream("127.0.0.1", relay.port, token)
        await relay.wait_attached(stream)
        await ghost.stream(connection, ends.ghost_table, stream)
        return ends

    def job(self, ends: Ends, args: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """A process on the "node" with the job's ends as its standard descriptors."""
        stdio = {name: ends.job.get(fd, subprocess.DEVNULL) for fd, name in enumerate(("stdin", "stdout", "stderr"))}
        process = self.popen(args, **{**stdio, **options})
        ends.close_job()
        return process

    async def terminal_job(self, ends: Ends, args: Sequence[str], controlling: bool = True) -> TerminalJob:
        """A job on a terminal, with a session leader above it as on a node."""
        fd = ends.job[0]
        read, write = os.pipe()
        command = [*PYTHON[:-1], str(VICTIMS / "placeholder.py"), str(write), str(int(controlling)), *args]
        leader = self.popen(
            command, stdin=fd, stdout=ends.job.get(1, fd), stderr=fd, start_new_session=True, pass_fds=[write]
        )
        os.close(write)
        ends.close_job()
        job = TerminalJob(read, leader)
        await eventually(lambda: job.look() is not None or job.pid, "the job starts")
        return job

    async def play_master(self, ghost: Ghost, job: TerminalJob) -> None:
        """What bpmaster does all day: carries signals to the job, and its stops, continues and end back."""
        seen = 0
        events = self.log[id(ghost)]
        while job.returncode is None:
            for event in events[seen:]:
                seen += 1
                if isinstance(event, Gone):
                    job.send_signal(signal.SIGKILL)
                if isinstance(event, Signal):
                    job.send_signal(event.signo)
            change = job.look()
            if change is None:
                await trio.sleep(0.002)
            elif change[0] == os.CLD_STOPPED:
                await ghost.stop(change[1])
            elif change[0] == os.CLD_CONTINUED:
                if ghost.state() == "T":
                    await ghost.cont()
            elif not ghost.gone:
                await end_like(ghost, job.returncode or 0)

    async def aclose(self) -> None:
        """Kills what is left, and reaps it."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
            await ended(process)


async def end_like(ghost: Ghost, returncode: int) -> None:
    """Ends a ghost as its job ended."""
    if returncode < 0:
        await ghost.killed(-returncode)
    else:
        await ghost.exit(returncode)


@asynccontextmanager
async def open_rig() -> AsyncIterator[Rig]:
    """A rig; all of it is gone afterwards."""
    async with trio.open_nursery() as nursery:
        rig = Rig(nursery)
        try:
            yield rig
        finally:
            with trio.CancelScope(shield=True):
                await rig.aclose()
            nursery.cancel_scope.cancel()


async def read_all(fd: int) -> bytes:
    """Everything up to the end of file."""
    parts = []

    def work() -> None:
        while part := os.read(fd, 1 << 20):
            parts.append(part)

    await in_thread(work)
    return b"".join(parts)


async def write_all(fd: int, data: bytes, close: bool = True) -> None:
    """Writes everything; the descriptor is closed after it (and by nobody else)."""

    def work() -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        if close:
            os.close(fd)

    await in_thread(work)


async def in_thread(work: Callable[[], None]) -> None:
    """A blocking call; a test that fails does not wait for it."""
    with trio.fail_after(DEADLINE):
        await trio.to_thread.run_sync(work, abandon_on_cancel=True)


def taken(pipe: Any) -> int:
    """The descriptor of a Popen's pipe, ours from now on."""
    fd = os.dup(pipe.fileno())
    pipe.close()
    return fd


class Terminal:
    """The master's side of a pseudo-terminal, driven like a person would."""

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        os.set_blocking(self.master, False)
        self.text = ""
        self.mark = 0

    def type(self, keys: str) -> None:
        """Types keys."""
        self.mark = len(self.text)
        os.write(self.master, keys.encode())

    async def see(self, text: str, since: int | None = None) -> None:
        """Waits until the text is on the screen, after the last `type` (or from `since`)."""
        start = self.mark if since is None else since
        deadline = time.monotonic() + DEADLINE
        while text not in self.text[start:]:
            if time.monotonic() > deadline:
                raise AssertionError(f"{text!r} is not in {self.text[start:]!r}")
            try:
                self.text += os.read(self.master, 65536).decode(errors="replace")
            except BlockingIOError:
                await trio.sleep(0.005)
            except OSError:
                raise AssertionError(f"the terminal closed; {text!r} is not in {self.text[start:]!r}") from None

    def modes(self) -> int:
        """Local modes, as tcgetattr says."""
        return int(termios.tcgetattr(self.slave)[3])

    def close(self) -> None:
        """Hangs up."""
        for fd in (self.master, self.slave):
            if fd >= 0:
                os.close(fd)
        self.master = self.slave = -1


def readable(fd: int) -> bool:
    """Whether a read would not block."""
    return bool(select.select([fd], [], [], 0)[0])
