"""Checkpoints: an image of a process goes into a file while the process goes on, wherever it runs.

The source is frozen and inspected as for a move, and streams its image to a worker of the master's, which writes the
file with the rights of the user who asked. Once the worker has all of it the process runs on; digests, compaction,
fsync and the rename come after that.
"""

from __future__ import annotations

import errno
import os
import shlex
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from bpfs import log
from bpfs.errors import BpfsError, errno_name
from bpfs.procs.away import carefully
from bpfs.procs.exchange import refuse, transfer
from bpfs.procs.ledger import Part
from bpfs.procs.phases import Figures
from bpfs.procs.places import Engine, MasterPlace, Place
from bpfs.procs.process import Process, ProcState
from bpfs.procs.rights import Rights, may_control, writes_itself
from bpfs.procs.surroundings import Surroundings
from bpfs.procs.wishes import Wishes, lives
from bpfs.tree.base import WriteRequest
from bpfs.tree.formats import parse_duration, parse_number

if TYPE_CHECKING:
    from bpfs.procs.service import Procs

SHORTEST_PERIOD = 1.0  # seconds between periodic images
MOST_KEPT = 100
LINES_KEPT = 32
TAKE_TIMEOUT = 30.0  # seconds that the keeper waits for the source, and for each piece

_log = log.get("procs")


@dataclass(frozen=True, slots=True)
class Order:
    """One line written to procs/PID/checkpoint.

    Attributes:
        stop: the process ends when its image is safe.
        since: name of an image in the same folder; only what differs from it is written.
        every: seconds between images; 0: just one.
        keep: how many images stay of a periodic one.
    """

    path: str
    stop: bool = False
    since: str = ""
    every: float = 0.0
    keep: int = 1


def parse_order(text: str) -> Order:
    """Reads `PATH [stop] [since NAME] [every 60s] [keep 3]`.

    Raises:
        BpfsError: EINVAL with a sentence.
    """
    path, *words = split(text)
    values: dict[str, str] = {}
    while words:
        word = words.pop(0)
        if word not in ("stop", "since", "every", "keep") or word in values:
            raise BpfsError(errno.EINVAL, f"'{word[:40]}' is unknown; known: stop, since NAME, every 60s, keep 3")
        if word != "stop" and not words:
            raise BpfsError(errno.EINVAL, f"'{word}' needs a value")
        values[word] = "" if word == "stop" else words.pop(0)
    every = parse_duration(values["every"], SHORTEST_PERIOD) if "every" in values else 0.0
    keep = parse_number(values["keep"], 1, MOST_KEPT, "number of images") if "keep" in values else 1
    if every and ("stop" in values or "since" in values):
        raise BpfsError(errno.EINVAL, "a periodic checkpoint goes neither with 'stop' nor with 'since'")
    return Order(path, "stop" in values, values.get("since", ""), every, keep)


def split(text: str) -> list[str]:
    """The words of a line that begins with a file's path, which may be quoted as in a shell.

    Raises:
        BpfsError: EINVAL.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise BpfsError(errno.EINVAL, f"'{text[:80]}': {error}") from None
    if not words or not words[0].startswith("/") or not os.path.basename(words[0]):
        raise BpfsError(errno.EINVAL, f"'{text[:80]}' does not begin with the absolute path of a file")
    return words


@dataclass(frozen=True, slots=True)
class Saved:
    """The last image of a periodic checkpoint. `ends`: of its stdio then, see `Stdio`."""

    path: str
    rights: Rights
    ends: dict[tuple[int, int], int]


@dataclass(slots=True)
class _Record:
    """What procs/PID/checkpoint shows of one process."""

    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LINES_KEPT))
    periodic: trio.CancelScope | None = None
    order: Order | None = None
    saved: Saved | None = None


class Checkpoints:
    """The checkpoints of all processes."""

    def __init__(self, procs: Procs, around: Surroundings, master: MasterPlace) -> None:
        self._procs = procs
        self._ghosts = around.ghosts
        self._contents = around.contents
        self._master = master
        self._records: dict[Process, _Record] = {}
        self._wishes = Wishes(procs.table, around.ghosts.ledger, Part.PERIODIC)

    def take_up(self) -> None:
        """Goes on with the periodic ones that an earlier master has left."""
        for proc, (path, every, keep, (uid, gid, groups), ends, taken) in self._wishes.left():
            order, rights = Order(path, every=every, keep=keep), Rights(uid, gid, tuple(groups))
            self._record(proc).saved = Saved(path, rights, {(dev, ino): number for dev, ino, number in ends})
            self._begin(proc, order, rights, min(max(0.0, taken + every - time.time()), every))

    def show(self, proc: Process) -> str:
        """The content of procs/PID/checkpoint: what is periodic, then the last images."""
        record = self._records.get(proc)
        if record is None:
            return ""
        order = record.order
        head = f"every {order.every:g}s keep {order.keep} {order.path}\n" if order is not None else ""
        return head + "".join(f"{line}\n" for line in record.lines)

    def saved(self, proc: Process) -> Saved | None:
        """The last image of a process that has periodic checkpoints."""
        record = self._records.get(proc)
        return record.saved if record is not None else None

    async def write(self, proc: Process, request: WriteRequest) -> None:
        """Carries out a write to procs/PID/checkpoint.

        Raises:
            BpfsError: EINVAL; EACCES the caller may not; EBUSY it moves or is being checkpointed; EOPNOTSUPP it cannot
                be dumped; else what opening or writing the file said.
        """
        may_control(request.caller, proc)
        if request.text == "off":
            self._cancel(proc)
            return
        order, rights = parse_order(request.text), Rights.of(request.caller)
        itself = writes_itself(request.caller, proc)
        if order.every:
            self._cancel(proc)
        await self._take(proc, order, rights, request if itself else None)
        if order.every:
            # At once: who reads the file, or calls it off, after this write has returned, finds it.
            self._begin(proc, order, rights, order.every)

    def _begin(self, proc: Process, order: Order, rights: Rights, pause: float) -> None:
        record = self._record(proc)
        record.order, record.periodic = order, trio.CancelScope()
        repeat = self._repeat(proc, order, rights, pause, record.periodic)
        self._ghosts.nursery.start_soon(carefully, proc.pid, repeat)

    def _record(self, proc: Process) -> _Record:
        for known in [one for one in self._records if one is not proc and not lives(one)]:
            del self._records[known]
            self._procs.table.forget(known)
        return self._records.setdefault(proc, _Record())

    def _cancel(self, proc: Process) -> None:
        record = self._record(proc)
        if record.periodic is not None:
            record.periodic.cancel()
        record.periodic = record.order = record.saved = None
        self._wishes.drop(proc)

    async def _repeat(
        self, proc: Process, order: Order, rights: Rights, pause: float, called_off: trio.CancelScope
    ) -> None:
        with called_off:
            while True:
                await trio.sleep(pause)
                pause = order.every
                if not lives(proc):
                    self._wishes.drop(proc)
                    break
                away = self._ghosts.stand_in(proc.pid)
                if away is not None and away.known is not None:
                    await away.known.wait()
                try:
                    await self._take(proc, order, rights, None)
                except BpfsError as error:  # the last good one stays; the next may do better
                    _log.warning("process %d: periodic checkpoint: %s", proc.pid, error)

    async def _take(self, proc: Process, order: Order, rights: Rights, writer: WriteRequest | None) -> None:
        if proc.owed is not None:
            await proc.owed.wait_whole()
        if proc.state is ProcState.MIGRATING or proc.busy:
            raise BpfsError(errno.EBUSY, f"process {proc.pid} is busy: {proc.busy or proc.progress}")
        self._procs.table.add(proc)  # from now on one object is this process
        figures, outcome, size = Figures(time.perf_counter()), "ok", 0
        proc.busy = f"checkpoint to {order.path}"
        ends = dict(self._ghosts.of(proc).stdio.ends) if proc.away else {}
        try:
            place = self._procs.place(proc.place)
            size = await _Taking(place, self._master, proc, order, rights, figures, self._contents).run(writer)
            if order.every:
                self._record(proc).saved = Saved(order.path, rights, ends)
                self._wishes.put(proc, _wish(order, rights, ends))
        except BpfsError as error:
            outcome = f"{errno_name(error.code)} {error.sentence}"
            raise
        finally:
            proc.busy = ""
            when = time.strftime("%Y-%m-%dT%H:%M:%S")
            self._record(proc).lines.append(
                f"{when} {order.path} freeze_ms={figures.freeze_ms:.1f} total_ms={figures.total_ms:.1f} "
                f"bytes={size} {outcome}"
            )


def _wish(order: Order, rights: Rights, ends: dict[tuple[int, int], int]) -> list[Any]:
    """For the next master, with the time of the last image."""
    places = [[dev, ino, number] for (dev, ino), number in ends.items()]
    return [order.path, order.every, order.keep, [rights.uid, rights.gid, list(rights.groups)], places, time.time()]


@dataclass(slots=True)
class _Taking:
    """One checkpoint."""

    source: Place
    master: MasterPlace
    proc: Process
    order: Order
    rights: Rights
    figures: Figures
    contents: int  # bytes of files without a name that may be in the image

    async def run(self, writer: WriteRequest | None) -> int:
        """Takes it. Returns the size of the file. Raises BpfsError; the process runs on."""
        async with self.master.engine() as keeper, self.source.engine() as src:
            listening = await keeper.call(
                "keep", path=self.order.path, since=self.order.since, address=self.master.address(self.source),
                **self.rights.arguments,
            )  # fmt: skip
            try:
                await self._foresee(src)
                await self._freeze(src, writer)
                await transfer(
                    lambda: src.call(
                        "send", host=self.master.address(self.source), port=listening["port"],
                        token=listening["token"],
                    ),
                    lambda: keeper.call("keep_image", timeout_s=TAKE_TIMEOUT),
                    self.figures,
                )  # fmt: skip
            except BpfsError as error:
                await self._release(src, error.code if writer is not None and writer.answered else 0)
                raise
            return await self._end(src, keeper, writer)

    async def _foresee(self, src: Engine) -> None:
        """Has digests of what it maps computed while it runs."""
        with suppress(BpfsError):  # the freeze will meet the obstacle again, and name it
            await src.call("look", pid=await self.source.hostpid(self.proc), files=True, digests=True)

    async def _freeze(self, src: Engine, writer: WriteRequest | None) -> None:
        hostpid = await self.source.hostpid(self.proc)
        looking: dict[str, Any] = {"contents": self.contents, "digests": True}
        self.figures.frozen = time.perf_counter()
        if writer is None:
            refuse((await src.call("freeze", pid=hostpid, inspect=True, **looking))["refusals"])
            return
        await src.call("freeze", pid=hostpid, writing=True)
        await writer.answer()
        refuse((await src.call("inspect", **looking))["refusals"])

    async def _end(self, src: Engine, keeper: Engine, writer: WriteRequest | None) -> int:
        if not self.order.stop and writer is None:
            await self._release(src, 0)
            self.figures.running = time.perf_counter()
            return await self._complete(keeper)
        try:  # between its image and its end it may do nothing; and its own write returns when the file is there
            size = await self._complete(keeper)
        except BpfsError as error:
            await self._release(src, error.code if writer is not None and writer.answered else 0)
            raise
        if self.order.stop:
            await src.call("vanish")
        else:
            await self._release(src, 0)
            self.figures.running = time.perf_counter()
        return size

    async def _complete(self, keeper: Engine) -> int:
        keep = self.order.keep if self.order.every else 1
        return int((await keeper.call("keep_done", keep=keep))["size"])

    async def _release(self, src: Engine, code: int) -> None:
        try:
            await src.call("release", errno=code)
        except BpfsError as error:
            _log.info("process %d: release after a checkpoint: %s", self.proc.pid, error)
