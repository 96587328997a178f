"""`procs/onexec`: one program for many processes, each on its own node.

A *template* is a process that is about to exec the program. It is dumped once, at its exec, and ends; its image goes to
the nodes of processes that wait, where it becomes a process with the pid of one of them, which turns into its ghost.
bpsh and libbproc start programs on many nodes in this way.

Up to the dump nothing has happened to those that wait: where that fails, the template does not exit with 0, and they
are left alone. From then on each goes its own way. Where one cannot be made, the process that waits for it says so and
exits, as one does that has written `PID onexec` and cannot move.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import trio

from bpfs import log
from bpfs.errors import BpfsError, errno_name
from bpfs.procs.away import Away, carefully, tell
from bpfs.procs.exchange import refuse
from bpfs.procs.ghost import Ghost
from bpfs.procs.images import ImageTree
from bpfs.procs.migration import Externals
from bpfs.procs.onexec import EXIT_CANNOT_MOVE
from bpfs.procs.ordered import BornThere, Form
from bpfs.procs.places import Engine, MasterPlace, NodePlace
from bpfs.procs.process import MASTER, ExitStatus, Process, ProcState
from bpfs.procs.rights import may_control
from bpfs.procs.surroundings import Surroundings
from bpfs.procs.verbs import parse_pid
from bpfs.tree.base import WriteRequest
from bpfs.tree.formats import parse_number
from bpfs.wire.messages import JobMade
from bpfs.wire.mux import Channel, ghost_table

if TYPE_CHECKING:
    from bpfs.procs.service import Procs

LINE_LIMIT = 1 << 16  # bytes of one order: some 4,000 processes
LINES_KEPT = 4096

_log = log.get("procs")


@dataclass(frozen=True, slots=True)
class Order:
    """One line written to procs/onexec: who is to be the program, and where."""

    template: int
    jobs: tuple[tuple[int, int, int], ...]  # pid, node, rank


def parse_order(text: str) -> Order:
    """Reads `TEMPLATE PID:NODE[:RANK] …`; who has no rank has that of his place in the line, from 0.

    Raises:
        BpfsError: EINVAL with a sentence; ESRCH.
    """
    template, *words = text.split()
    if not words:
        raise BpfsError(errno.EINVAL, "write TEMPLATE PID:NODE ..., process ids and the nodes for them")
    order = Order(parse_pid(template), tuple(_parse_job(index, word) for index, word in enumerate(words)))
    if len({order.template, *(pid for pid, *_ in order.jobs)}) <= len(words):
        raise BpfsError(errno.EINVAL, "a process stands there twice")
    return order


def _parse_job(index: int, word: str) -> tuple[int, int, int]:
    pid, *rest = word.split(":")
    if not 1 <= len(rest) <= 2:
        raise BpfsError(errno.EINVAL, f"'{word[:40]}' is not PID:NODE or PID:NODE:RANK")
    node = parse_number(rest[0], MASTER, 2**31 - 1, "node")
    return parse_pid(pid), node, parse_number(rest[1], 0, 2**31 - 1, "rank") if len(rest) == 2 else index


@dataclass(frozen=True, slots=True)
class Original:
    """What `image` of engine/batch.py gives, for nodes of one kind."""

    kind: object  # of the nodes
    image: Form
    order: Form | None  # which is preferred
    process: dict[str, Any]
    externals: Externals
    name: bytes = b""  # by which the nodes have the preferred form; empty: it is sent to each

    @property
    def preferred(self) -> Form:
        """What nodes get, unless they cannot do with it."""
        return self.order or self.image


class Copy(BornThere):
    """One of those that wait: it leaves the master, as far as anybody can see, for its node."""

    def __init__(
        self, rank: int, proc: Process, source: MasterPlace, destination: NodePlace, around: Surroundings
    ) -> None:
        super().__init__(proc, source, destination, around)
        self.rank = rank
        self.kind = {name: self.looking.get(name) for name in ("unlike", "digests")}  # of the node: one image each

    async def make(self, engine: Engine, original: Original) -> None:
        """Has the one that waits become the ghost, and the node make what it stands for.

        Raises:
            BpfsError: there is no such process on the node, and nobody cares for the ghost any more.
        """
        self.proc.progress = f"start on node {self.destination.number}"
        process, proc = original.process, self.proc
        proc.identity = replace(proc.identity, cmdline=b"".join(word + b"\0" for word in process["cmdline"]))
        channels = self.channels(original.externals)
        self._stdio.comm = bytes(process["comm"])
        away = await self._make_ghost(engine, process)
        try:
            async with away.quiet:  # signals for it wait until it is there
                await tell(away.ghost.name(self._stdio.comm))
                made, connection = await self._make_there(original, channels)
                self._stdio.files = dict(zip(made.files, made.handles, strict=True))
                self._stdio.ends = {(dev, ino): channel for dev, ino, channel in made.ends}
                table = ghost_table(self._stdio.channels.values())
                await tell(away.ghost.stream(connection, table, self._stdio.stream))
        except BaseException:
            self._around.ghosts.retire(away)
            proc.put(MASTER)
            self._around.ghosts.table.end(proc, ExitStatus(code=EXIT_CANNOT_MOVE))
            raise
        proc.hostpid = made.hostpid
        self._around.ghosts.note(away)
        self.figures.bytes = len(original.preferred.content)
        self.figures.running = time.perf_counter()

    async def _make_ghost(self, engine: Engine, process: dict[str, Any]) -> Away:
        proc, around = self.proc, self._around
        program = around.programs.descriptor(proc.pid, int(process["euid"]), int(process["rights"]))
        ours, theirs = Ghost.pair()
        with theirs:
            try:
                env = around.environment
                await engine.call("become_ghost_of", [program, theirs.fileno()], env=env, **whom(proc))
            except BaseException:
                if not around.is_ghost(proc.pid):  # the worker may have died right after the exec
                    ours.close()
                    raise
        self._is_there()
        return around.ghosts.adopt(proc, Ghost(proc.pid, ours), self._stdio)

    async def _make_there(self, original: Original, channels: list[Channel]) -> tuple[JobMade, socket.socket]:
        if (away := self._around.ghosts.stand_in(self.proc.pid)) is not None:
            self._around.ghosts.note(away)
        if original.order is not None and not self.strict:
            try:
                self.begin_stream()
                return await self.have_made(original.order, channels, original.name, self.rank)
            except BpfsError as error:
                if error.code in (errno.EHOSTDOWN, errno.ETIMEDOUT):
                    raise
                _log.info("process %d is rebuilt from its image: %s", self.proc.pid, error)
        self.begin_stream()
        name = b"" if original.order is not None else original.name
        return await self.have_made(original.image, channels, name, self.rank)


def whom(proc: Process) -> dict[str, int]:
    """A process that waits, for the engine."""
    return {"pid": proc.pid, "start": proc.identity.start}


class Batches:
    """Serves procs/onexec."""

    def __init__(self, procs: Procs, around: Surroundings, master: MasterPlace) -> None:
        self._procs, self._around, self._master = procs, around, master
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self.images = ImageTree(around.fanout, around.tree_timeout)

    def show(self) -> str:
        """The content of procs/onexec: how the last ones went, oldest first."""
        return "".join(self._lines)

    def _note(self, pid: int, node: int, error: BpfsError | None) -> None:
        outcome = f"{errno_name(error.code)} {error.sentence}" if error is not None else "ok"
        self._lines.append(f"{pid} {node} {outcome}\n")

    async def write(self, request: WriteRequest) -> None:
        """Carries out a write; returns when the template is held. Which processes were refused can be read then.

        Raises:
            BpfsError: EINVAL; ESRCH; EACCES; EOPNOTSUPP where it is written on a node; EREMOTEIO where some are refused
                and the others go on; where all are, the first one's.
        """
        order, caller = parse_order(request.text), request.caller
        if caller.node != MASTER:
            raise BpfsError(errno.EOPNOTSUPP, "this is for processes of the master: write it there")
        template = self._procs.table.find(order.template)
        may_control(caller, template)
        copies, errors = [], []
        for pid, node, rank in order.jobs:
            try:
                copies.append(await self._admit(rank, pid, node, request))
            except BpfsError as error:
                errors.append(error)
                self._note(pid, node, error)
        if not copies:
            raise errors[0]
        await self._around.ghosts.nursery.start(self._follow, template.pid, copies, name=f"batch of {template.pid}")
        if errors:
            raise BpfsError(errno.EREMOTEIO, f"{len(errors)} of {len(order.jobs)} are left behind: {errors[0]}")

    async def _admit(self, rank: int, pid: int, node: int, request: WriteRequest) -> Copy:
        proc = await self._procs.admit(pid, node, request.caller)
        place = self._procs.place(node)
        if proc.away or not isinstance(place, NodePlace):
            raise BpfsError(errno.EOPNOTSUPP, f"process {pid} goes from the master to a node, or not at all")
        copy = Copy(rank, proc, self._master, place, self._around)
        if copy.children:
            raise BpfsError(errno.EOPNOTSUPP, f"process {pid} has children, which it would not know any more")
        return copy

    async def _follow(
        self, template: int, copies: list[Copy], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with self._master.engine() as engine:
            await engine.call("arm_template", pid=template)
            task_status.started()
            await carefully(template, self._make_all(engine, copies))

    async def _make_all(self, engine: Engine, copies: list[Copy]) -> None:
        await engine.call("wait_template")
        originals: list[Original] = []
        for copy in copies:
            if not any(original.kind == copy.kind for original in originals):
                originals.append(await self._take_image(engine, copy.kind))
        await engine.call("end_template")
        async with trio.open_nursery() as nursery:
            for original in originals:
                alike = [copy for copy in copies if copy.kind == original.kind]
                nursery.start_soon(self._make_alike, engine, alike, original)

    async def _make_alike(self, engine: Engine, copies: list[Copy], original: Original) -> None:
        async with self.images.spread(original.preferred.content, [copy.destination for copy in copies]) as name:
            named = replace(original, name=name)
            async with trio.open_nursery() as nursery:
                for copy in copies:
                    nursery.start_soon(carefully, copy.proc.pid, self._make_one(engine, copy, named))

    async def _take_image(self, engine: Engine, kind: dict[str, Any]) -> Original:
        reply = await engine.call("image", contents=self._around.contents, **kind)
        refuse(reply["refusals"])
        if (kind["unlike"] or {}).get("bare"):
            hidden = [path for path in reply["files"] if not self._around.exports.holds(os.fsdecode(path))]
            if hidden:  # they come along with those that go by themselves, engine/lending.py
                raise BpfsError(errno.ENOENT, f"{os.fsdecode(hidden[0])} is not exported: each has to go by itself")
        image, order = Form(reply["image"], reply["rank"], reply["random"]), None
        if reply["order"] is not None:
            table, keys, rank = reply["order"]
            order = Form(table, rank, keys=tuple(keys))
        return Original(kind, image, order, reply["process"], reply["externals"])

    def _is_elsewhere(self, proc: Process) -> bool:
        # Another order, or somebody who moved it, was faster.
        known = self._procs.table.known(proc.pid)
        return known is not None and (known.away or known.state is ProcState.MIGRATING)

    async def _make_one(self, engine: Engine, copy: Copy, original: Original) -> None:
        if self._is_elsewhere(copy.proc):
            error = BpfsError(errno.EBUSY, f"process {copy.proc.pid} does not wait any more")
            self._note(copy.proc.pid, copy.destination.number, error)
            return
        try:
            await self._procs.carry_out(copy, lambda: copy.make(engine, original))
            self._note(copy.proc.pid, copy.destination.number, None)
        except BpfsError as error:
            self._note(copy.proc.pid, copy.destination.number, error)
            await self._refuse(engine, copy, error)

    async def _refuse(self, engine: Engine, copy: Copy, error: BpfsError) -> None:
        text = f"bpfs: process {copy.proc.pid} cannot run on node {copy.destination.number}: {error}\n"
        told: dict[str, Any] = {"code": EXIT_CANNOT_MOVE, "message": text.encode(), **whom(copy.proc)}
        _log.info("%s", text.strip())
        try:
            await engine.call("refuse", **told)
        except BpfsError as failure:
            if failure.code != errno.EIO:
                return  # it has ended by itself
            async with self._master.engine() as another:  # that worker has died
                await another.call("refuse", **told)
