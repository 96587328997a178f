"""Restarts: a process comes back from its checkpoint, on the master or on a node.

A ghost is made first, with the pid, by a worker of the master's. From then on it is a move whose source is a file: on
the master the process is rebuilt inside the ghost, as one that comes home; on a node the ghost stays and relays.
"""

from __future__ import annotations

import errno
import signal
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from bpfs import log
from bpfs.errors import BpfsError, errno_name
from bpfs.nodes.registry import MASTER
from bpfs.procs.away import Away, carefully, tell
from bpfs.procs.checkpoint import LINES_KEPT, TAKE_TIMEOUT, Saved, split
from bpfs.procs.exchange import transfer
from bpfs.procs.ghost import Ghost
from bpfs.procs.phases import Figures
from bpfs.procs.places import HANDLES, LOOPBACK, Engine, MasterPlace, NodePlace, Place
from bpfs.procs.process import ExitStatus, Pid, Process, ProcState
from bpfs.procs.rights import Rights, admits
from bpfs.procs.stdio import Attached, Stdio, attach, detach
from bpfs.procs.surroundings import Surroundings
from bpfs.procs.table import read_identity
from bpfs.tree.base import Caller, WriteRequest
from bpfs.tree.formats import parse_number
from bpfs.wire.mux import Channel, ghost_table

if TYPE_CHECKING:
    from bpfs.procs.service import Procs

ANY_PID = "anypid"
GHOST_ENDS = 2.0  # seconds for the ghost of a restart that failed

_log = log.get("procs")


@dataclass(frozen=True, slots=True)
class Order:
    """One line written to procs/restart. `anypid`: another pid will do where its own is in use."""

    path: str
    node: int = MASTER
    anypid: bool = False


def parse_restart(text: str) -> Order:
    """Reads `PATH [NODE] [anypid]`.

    Raises:
        BpfsError: EINVAL with a sentence.
    """
    path, *words = split(text)
    anypid = ANY_PID in words
    rest = [word for word in words if word != ANY_PID]
    if len(rest) > 1 or len(words) - len(rest) > 1:
        raise BpfsError(errno.EINVAL, f"'{' '.join(words)[:40]}': write PATH [NODE] [anypid]")
    return Order(path, parse_number(rest[0], MASTER, 2**31 - 1, "node") if rest else MASTER, anypid)


@dataclass(slots=True)
class _Line:
    """Of procs/restart. `end`: `exit 3` or `signal 15`, once it has ended."""

    text: str = ""
    end: str = ""


class Restarts:
    """Brings processes back."""

    def __init__(self, procs: Procs, around: Surroundings, master: MasterPlace) -> None:
        self._procs = procs
        self._around = around
        self._master = master
        self._lines: deque[_Line] = deque(maxlen=LINES_KEPT)

    def show(self) -> str:
        """The content of procs/restart: the last ones, oldest first."""
        return "".join(f"{line.text} {line.end}".rstrip() + "\n" for line in self._lines)

    async def write(self, request: WriteRequest) -> None:
        """Carries out a write to procs/restart; returns when the process runs.

        Raises:
            BpfsError: EINVAL; ENOENT, EHOSTDOWN, EACCES of the node; EEXIST its pid is in use; EPERM the image is not
                the caller's; EBADMSG it is damaged; else what is missing where it should run.
        """
        order = parse_restart(request.text)
        began, pid, outcome, line = time.perf_counter(), 0, "ok", _Line()
        try:
            caller = request.caller
            revival = _Revival(self._around, self._master, self._procs, order, caller, Rights.of(caller))
            pid = await revival.run(line)
        except BpfsError as error:
            outcome = f"{errno_name(error.code)} {error.sentence}"
            raise
        finally:
            total = (time.perf_counter() - began) * 1e3
            when = time.strftime("%Y-%m-%dT%H:%M:%S")
            line.text = f"{when} {order.path} pid={pid} node={order.node} total_ms={total:.1f} {outcome}"
            self._lines.append(line)

    async def rescue(self, away: Away, node: int, saved: Saved) -> None:
        """Brings back a process whose node was lost, on another node, behind the ghost that it still has.

        Raises:
            BpfsError: as `write`; nothing of it stays but the ghost.
        """
        caller = Caller(away.proc.pid, saved.rights.uid, saved.rights.gid)
        admits(self._procs.nodes.get(node), caller, away.proc)
        revival = _Revival(self._around, self._master, self._procs, Order(saved.path, node), caller, saved.rights)
        await revival.rescue(away, saved)


class _Revival:
    """One restart."""

    def __init__(
        self, around: Surroundings, master: MasterPlace, procs: Procs, order: Order, caller: Caller, rights: Rights
    ) -> None:
        self._around, self._master, self._procs = around, master, procs
        self._order, self._caller, self._rights = order, caller, rights

    async def rescue(self, away: Away, saved: Saved) -> None:
        """See `Restarts.rescue`."""
        place = self._procs.place(self._order.node)
        assert isinstance(place, NodePlace)
        async with away.quiet, self._master.engine() as source, place.engine() as dst:
            image = await self._load(source, relayed=True)
            channels = away.stdio.rejoined(image["externals"], saved.ends)
            away.stdio.files = {}
            await self._build_on_node(place, source, dst, away, channels)
            away.proc.arrived(self._order.node, 0.0, image["bytes"])
            self._around.ghosts.note(away)

    async def run(self, line: _Line) -> int:
        """Returns the pid. Raises BpfsError; nothing of it stays."""
        caller, order = self._caller, self._order
        place = self._procs.place(order.node)
        async with self._master.engine() as source, place.engine() as dst:
            image = await self._load(source)
            away = await self._bear(source, image)
            proc = away.proc
            self._around.ghosts.nursery.start_soon(carefully, proc.pid, self._note_end(proc, line))
            proc.state, proc.progress = ProcState.MIGRATING, f"restart on node {order.node}"
            try:
                if order.node != MASTER:
                    admits(self._procs.nodes.get(order.node), caller, proc)
                await self._build(place, source, dst, away, image)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._abandon(dst, away)
                raise
            proc.state = ProcState.RUNNING
            self._around.ghosts.note(away)
            self._procs.table.changed(proc, f"restarted on node {order.node}")
            return proc.pid

    async def _note_end(self, proc: Process, line: _Line) -> None:
        # It may have ended before anybody can ask for it.
        line.end = str(await self._procs.wait(proc))

    async def _load(self, source: Engine, relayed: bool = False) -> dict[str, Any]:
        return await source.call(
            "load", path=self._order.path, limits_of=self._limits_of(), relayed=relayed, **self._rights.arguments
        )

    def _limits_of(self) -> int:
        # Whoever calls from a node has a ghost here, with the same limits; should it be gone, those of init bound him.
        try:
            read_identity(self._caller.pid)
        except BpfsError:
            return 1
        return self._caller.pid

    async def _bear(self, source: Engine, image: dict[str, Any]) -> Away:
        numbers = sorted(fd for external in image["externals"] for fd in external["fds"])
        readers = {fd for external in image["externals"] if external["access"] == 0 for fd in external["fds"]}
        ours, theirs = Ghost.pair()
        with theirs:
            pid = await self._bear_as(source, image, theirs.fileno(), numbers, readers)
        proc = Process(Pid(pid), read_identity(pid), place=self._order.node)
        stdio = Stdio.of(image["externals"])
        stdio.comm = image["comm"]
        self._procs.table.add(proc)
        return self._around.ghosts.adopt(proc, Ghost(pid, ours), stdio)

    async def _bear_as(
        self, source: Engine, image: dict[str, Any], control: int, numbers: list[int], readers: set[int]
    ) -> int:
        output = self._caller.pid if self._caller.node == MASTER else 0
        pids = (image["pid"], 0) if self._order.anypid else (image["pid"],)
        for pid in pids:
            try:
                program = self._around.programs.descriptor(pid, image["uid"], image["rights"])
                reply = await source.call(
                    "bear", [program, control], pid=pid, uid=image["uid"], gid=image["gid"],
                    groups=image["groups"], inputs=sorted(readers), outputs=[n for n in numbers if n not in readers],
                    output_of=output, arguments=[image["name"]], env=self._around.environment,
                )  # fmt: skip
            except BpfsError as error:
                if error.code != errno.EEXIST or pid == pids[-1]:
                    raise
                continue
            if not pid:
                await source.call("load_as", pid=reply["pid"])
            return int(reply["pid"])
        raise AssertionError("unreachable")

    async def _build(self, place: Place, source: Engine, dst: Engine, away: Away, image: dict[str, Any]) -> None:
        await away.ghost.wait_ready()
        await tell(away.ghost.name(away.stdio.comm))
        if isinstance(place, NodePlace):
            await self._build_on_node(place, source, dst, away, list(away.stdio.channels.values()))
            return
        keys = {external["key"]: external["fds"][0] for external in image["externals"]}
        reply = await dst.call(
            "prepare", pid=away.proc.pid, ppid=0, pgid=0, sid=0,
            place=self._master.target(away.proc.pid), address=LOOPBACK,
        )  # fmt: skip
        await self._transfer(source, dst, LOOPBACK, reply, {"ghost_fds": keys}, [])
        away.retired = True
        await dst.call("resume")
        self._around.ghosts.retire(away)
        self._procs.table.forget(away.proc)

    async def _build_on_node(
        self, place: NodePlace, source: Engine, dst: Engine, away: Away, channels: list[Channel]
    ) -> None:
        proc, identity, stdio = away.proc, away.proc.identity, away.stdio
        attached = await attach(place, self._around.streams, channels, identity.uid, identity.gid)
        try:
            address = place.address(self._master)
            reply = await dst.call(
                "prepare", pid=proc.pid, ppid=identity.ppid, pgid=identity.pgid, sid=identity.sid,
                place=place.target(proc.pid), address=address, terminal=attached.terminal, front=True,
            )  # fmt: skip
            await self._transfer(source, dst, address, reply, {"externals": attached.places}, attached.fds)
            running = await dst.call("resume")
        except BaseException:
            attached.connection.close()
            await detach(place, attached.number)
            raise
        proc.hostpid = int(running["hostpid"])
        stdio.files = dict(zip(running["files"], running[HANDLES], strict=True))
        stdio.stream, stdio.ends = attached.number, attached.ends
        await self._join(away, attached)

    async def _join(self, away: Away, attached: Attached) -> None:
        await tell(away.ghost.stream(attached.connection, ghost_table(away.stdio.channels.values()), attached.number))

    async def _transfer(
        self, source: Engine, dst: Engine, host: str, landing: dict[str, Any], more: dict[str, Any], fds: list[int]
    ) -> None:
        await transfer(
            lambda: source.call("give", host=host, port=landing["port"], token=landing["token"]),
            lambda: dst.call("receive", fds, timeout_s=TAKE_TIMEOUT, **({"externals": {}, "ghost_fds": {}} | more)),
            Figures(time.perf_counter()),
        )

    async def _abandon(self, dst: Engine, away: Away) -> None:
        with suppress(BpfsError):
            await dst.call("discard")
        away.proc.state, away.retired = ProcState.RUNNING, False
        _log.info("process %d did not come back from %s", away.proc.pid, self._order.path)
        await self._around.ghosts.end(away.proc, ExitStatus(signal=signal.SIGKILL))
        with trio.move_on_after(GHOST_ENDS):
            await away.ghost.wait_gone()
