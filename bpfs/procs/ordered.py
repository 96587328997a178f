"""Processes that are born on a node, of an order to make an exec there (engine/execorder.py) or of an image that many
share, while another one turns into the ghost of each.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from signal import SIGKILL
from typing import Any

import trio

from bpfs import log
from bpfs.errors import BpfsError, LinkClosed
from bpfs.procs import faults
from bpfs.procs.entries import Bound
from bpfs.procs.exchange import both
from bpfs.procs.leave import Leave
from bpfs.procs.migration import Release
from bpfs.procs.places import Engine, NodePlace
from bpfs.procs.process import ExitStatus
from bpfs.procs.stdio import CONNECT_TIMEOUT, Attached, detach, plain
from bpfs.procs.surroundings import Surroundings
from bpfs.wire.messages import JobMade, MakeJob, Signal
from bpfs.wire.mux import Channel

_log = log.get("procs")


@dataclass(frozen=True, slots=True)
class Form:
    """A program at its exec as an image, or as an order to exec it (`keys`: engine/execorder.py)."""

    content: bytes
    rank: Sequence[int] | None
    random: int = -1
    keys: tuple[int, ...] | None = None

    def patches(self, rank: int) -> list[list[Any]]:
        """What differs in it for the process with this rank."""
        if self.rank is None:
            return []
        offset, width = self.rank
        text = b"%d" % rank
        return [[offset, text.ljust(width, b"\0")]] if len(text) <= width else []


class BornThere(Leave):
    """One that leaves the master for a node without being moved there."""

    destination: NodePlace

    def begin_stream(self) -> None:
        """Its stream is going to be another one than any that there has been."""
        self._stdio.stream = self._around.streams.new_number()

    async def have_made(
        self, form: Form, channels: list[Channel], name: bytes = b"", rank: int = 0
    ) -> tuple[JobMade, socket.socket]:
        """Has the node make it, and join it to a new stream; gives our end of that.

        Args:
            name: by which the node has the form; empty: it is sent.
            rank: what is the process's own in it.

        Raises:
            BpfsError: there is no such process on the node, and no such stream.
        """
        proc, place, who = self.proc, self.destination, self.proc.identity
        number = self._stdio.stream
        session, front = self.terminal_of(channels)
        with self._around.streams.expect() as expected:
            message = MakeJob(
                proc.pid, who.ppid, who.pgid, who.sid, session, front, number, expected.token,
                plain(channels), who.uid, who.gid, b"" if name else form.content, name, form.keys,
                form.patches(rank), form.random, self.strict,
            )  # fmt: skip
            try:
                made = await place.link.request(message, place.link.patience)
                connection = await expected.wait_connected(CONNECT_TIMEOUT)
            except LinkClosed as error:
                # It may run there. That it does not any more has to be sure before anybody is told that it failed.
                if await place.outlives(proc.pid):
                    await self.end_there(number)
                raise BpfsError(errno.EHOSTDOWN, f"node {place.number} was lost: {error.sentence}") from error
            except BpfsError as error:
                if error.code == errno.ETIMEDOUT:
                    await self.end_there(number)
                raise
        assert isinstance(made, JobMade)
        return made, connection

    async def end_there(self, stream: int) -> None:
        """Kills it, if it was made, and closes the stream. Where the node is lost, that is seen to when it is back."""
        with suppress(BpfsError):
            place = NodePlace(self.destination.node)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_kill, place, self.proc.pid)
                nursery.start_soon(detach, place, stream)


async def _kill(place: NodePlace, pid: int) -> None:
    with suppress(BpfsError):
        await place.link.request(Signal(pid, SIGKILL, 0, 0, 0, 0), place.link.patience)


class AtExec(BornThere):
    """A process that stands at its exec, of which its engine has written an order.

    Its program may run over there before the ghost is made here, but never here: the process ends with its engine.
    """

    def __init__(self, migration: Leave, told: dict[str, Any], around: Surroundings) -> None:
        """Args:
        migration: how it would move otherwise.
        told: by the engine's `wait_exec`.
        """
        super().__init__(migration.proc, migration.source, migration.destination, around)
        self.wants_strict = migration.wants_strict
        table, keys = told["order"]
        self._form, self._told = Form(table, None, keys=tuple(keys)), told

    async def start(self, engine: Engine, end: Release) -> None:
        """Has the node make it, and the engine that holds it turn it into its ghost.

        Where it cannot be born there it moves with all that it is. `end` ends it with a sentence.

        Raises:
            BpfsError: it has ended.
        """
        with trio.CancelScope(shield=True):
            there = await self._start(engine, end)
        if not there:
            await self.run_stopped(engine, end)

    async def _start(self, engine: Engine, end: Release) -> bool:
        self.figures.frozen = self.figures.began
        self.proc.progress = f"start on node {self.destination.number}"
        channels = self.channels(self._told["externals"])
        self._make_ghost_ready(self._told["process"])
        self.begin_stream()
        bound = Bound(self.destination.number, self._stdio.stream, {})
        self._around.ghosts.reports.expect(self.proc, bound, self._stdio)
        await faults.hold("order")
        ready, made = await both(lambda: self._prepare_ghost(engine), lambda: self.have_made(self._form, channels))
        if isinstance(made, BpfsError):
            await self._stay_here(engine, end, made)
            return False
        self.figures.running, self.figures.bytes = time.perf_counter(), len(self._form.content)
        self._attached = attached(self._stdio.stream, *made)
        await self._become_ghost(engine, ready)
        self.proc.hostpid = made[0].hostpid
        await self.departed()
        return True

    async def _prepare_ghost(self, engine: Engine) -> None:
        await engine.call("make_ghost_ready", self.ghost_fds(), env=self.ghost_environment)

    async def _stay_here(self, engine: Engine, end: Release, error: BpfsError) -> None:
        await self.stay()
        await engine.call("stay")
        if error.code in (errno.EHOSTDOWN, errno.ETIMEDOUT):
            await end(error)
            raise error
        _log.info("process %d moves to its node with all that it is: %s", self.proc.pid, error)

    async def _become_ghost(self, engine: Engine, error: BpfsError | None) -> None:
        assert self._attached is not None
        self._around.ghosts.reports.note_bound(self.proc, self.bound(), self._stdio)
        await faults.hold("ordered")
        if error is None:
            try:
                await engine.call("become_ghost")
                return
            except BpfsError as failure:
                error = failure
        if not await self.has_departed(error, whole=True):
            await self._end_both(error)

    async def _end_both(self, error: BpfsError) -> None:
        """It was killed, or its engine was: what runs over there ends as well."""
        with suppress(ProcessLookupError):
            os.kill(self.proc.pid, SIGKILL)
        await self.end_there(self._stdio.stream)
        await self.stay()
        self.proc.doom = ExitStatus(signal=SIGKILL)
        raise error


def attached(stream: int, made: JobMade, connection: socket.socket) -> Attached:
    """What a process that was made on its node has of stdio."""
    return Attached(stream, connection, [], {}, {(dev, ino): channel for dev, ino, channel in made.ends}, "")
