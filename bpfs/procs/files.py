"""The files of /bpfs/procs and what processes add to /bpfs/nodes/N. See bpfs(5)."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from errno import EINVAL
from typing import TYPE_CHECKING

from bpfs.errors import BpfsError
from bpfs.nodes.registry import Node, NodeTable
from bpfs.procs import kernelfiles
from bpfs.procs.batch import LINE_LIMIT
from bpfs.procs.process import Process, ProcState
from bpfs.procs.verbs import MoveVerb, parse_move, parse_pid
from bpfs.rundir import process_start
from bpfs.tree.entries import Access, Collection, File, Table, WriteRequest
from bpfs.tree.formats import parse_number

if TYPE_CHECKING:
    from bpfs.procs.service import Procs


class ProcFiles:
    """The tables, bound to the service that does the work."""

    def __init__(self, procs: Procs) -> None:
        self._procs = procs

    # -- /bpfs/procs ---------------------------------------------------------------------------------------

    def collection(self) -> Collection[NodeTable]:
        """The directory `procs`."""
        return Collection(
            "procs",
            "a directory a process that is away or on its way; any other process of the master by its number",
            names=lambda _: [str(proc.pid) for proc in self._procs.table if proc.away],
            lookup=lambda _, name: self._lookup(name),
            table=self.process_table(),
            fixed=Table(
                File(
                    "restart",
                    "write PATH [NODE] [anypid]: brings a checkpointed process back; read: the last ones",
                    read=lambda _: self._procs.restarts.show(),
                    write=self._restart,
                    mode=0o666,
                ),
                File(
                    "onexec",
                    "write TEMPLATE PID:NODE ...: what TEMPLATE execs runs on nodes, as these processes, which wait",
                    read=lambda _: self._procs.batches.show(),
                    write=self._batch,
                    mode=0o666,
                    limit=LINE_LIMIT,
                ),
            ),
            member_access=lambda proc: Access(proc.identity.uid, proc.identity.gid, 0o555),
            member_key=lambda proc: (proc.pid, proc.identity.uid, proc.identity.gid),
            member_lasting=False,
        )

    async def _restart(self, _: NodeTable, request: WriteRequest) -> None:
        await self._procs.restarts.write(request)

    async def _batch(self, _: NodeTable, request: WriteRequest) -> None:
        await self._procs.batches.write(request)

    def _lookup(self, name: str) -> Process | None:
        try:
            return self._procs.table.find_or_recall(parse_pid(name))
        except BpfsError:
            return None

    def process_table(self) -> Table[Process]:
        """The table of procs/PID."""
        procs = self._procs

        def owned(mode: int) -> Callable[[Process], Access]:
            return lambda proc: Access(proc.identity.uid, proc.identity.gid, mode)

        async def move(proc: Process, request: WriteRequest) -> None:
            if request.text.strip() == "cancel":
                procs.cancel(proc, request.caller)
            else:
                await procs.move(MoveVerb(proc.pid), parse_number(request.text, -1, 2**31 - 1, "node"), request)

        async def send_signal(proc: Process, request: WriteRequest) -> None:
            await procs.signal(proc, parse_signal(request.text), request.caller)

        async def wait(proc: Process) -> str:
            return f"{await procs.wait(proc)}\n"

        async def cantmove(proc: Process) -> str:
            return "".join(f"{line}\n" for line in await procs.obstacles(proc))

        async def canttree(proc: Process) -> str:
            return "".join(f"{line}\n" for line in await procs.tree_obstacles(proc))

        async def rusage(proc: Process) -> str:
            return await procs.rusage(proc)

        async def mapped(proc: Process) -> str:
            return await procs.mapped(proc)

        return Table(
            File(
                "node",
                "where it runs, or `migrating`; write a node's number to move it, `cancel` to call a move off",
                read=_node,
                write=move,
                access=owned(0o644),
            ),
            File(
                "state",
                "running, stopped, ended, `migrating: PHASE for node N`, and how far its memory is",
                read=_state,
            ),
            File("strict", "whether it is a strict job: yes or no", read=_strict),
            File("cmdline", "its command line, as in /proc/PID/cmdline", read=lambda proc: proc.identity.cmdline),
            File("rusage", "CPU time in seconds and memory in kB, `key value` lines", read=rusage, sized=False),
            File("signal", "write a signal's name or number", write=send_signal, access=owned(0o200)),
            File("history", "a line a place: node, since when, freeze_ms, bytes; why it was killed", read=_history),
            File(
                "cantmove",
                "why it cannot move now, a line an obstacle; empty if it can",
                read=cantmove,
                access=owned(0o400),
                sized=False,
            ),
            File(
                "canttree",
                "why it cannot move with its tree now, a line an obstacle of any of them; empty if they can",
                read=canttree,
                access=owned(0o400),
                sized=False,
            ),
            File(
                "mapped",
                "the files that it maps, and whose they are there: own, cache, network or carried",
                read=mapped,
                access=owned(0o400),
                sized=False,
            ),
            File(
                "checkpoint",
                "write PATH [stop] [since NAME] [every 60s] [keep 3], or off; read: the last images",
                read=lambda proc: procs.checkpoints.show(proc),
                access=owned(0o600),
                write=lambda proc, request: procs.checkpoints.write(proc, request),
            ),
            File(
                "onloss",
                "when its node is lost: kill, or restart from its last periodic checkpoint",
                read=lambda proc: f"{proc.onloss.value}\n",
                access=owned(0o644),
                write=lambda proc, request: procs.losses.choose(proc, request),
            ),
            *kernelfiles.entries(lambda proc, names: procs.ghosts.status_files(proc, names)),
            File("wait", "blocks until it ended, then `exit 3` or `signal 15`", read=wait, blocks=True),
        )

    # -- /bpfs/nodes/N -------------------------------------------------------------------------------------

    def node_entries(self) -> tuple[File[Node] | Collection[Node], ...]:
        """What goes into the table of a node."""
        procs = self._procs

        async def moves(node: Node) -> str:
            return "".join(f"{move}\n" for move in await procs.moves_to(int(node.number)))

        async def migrate(node: Node, request: WriteRequest) -> None:
            verb = parse_move(request.text)
            await procs.migrate(verb, int(node.number), request)

        return (
            File(
                "migrate",
                "the last moves to this node; write a pid to move it here",
                write=migrate,
                read=moves,
                access=lambda node: Access(node.uid, node.gid, 0o444 | (node.mode & 0o111) << 1),
            ),
            Collection(
                "procs",
                "symbolic links to the processes that are here",
                names=lambda node: [str(proc.pid) for proc in procs.table.away_on(int(node.number))],
                lookup=lambda node, name: self._lookup_on(int(node.number), name),
                link=lambda proc, _: f"../../../procs/{proc.pid}",
                member_lasting=False,
            ),
        )

    def _lookup_on(self, node: int, name: str) -> Process | None:
        proc = self._lookup(name)
        return proc if proc is not None and proc.place == node else None


async def _node(proc: Process) -> str:
    await proc.wait_landed()
    return "migrating\n" if proc.state is ProcState.MIGRATING else f"{proc.place}\n"


async def _state(proc: Process) -> str:
    await proc.wait_landed()
    if proc.copying or proc.state is ProcState.MIGRATING:
        return f"migrating: {proc.copying or proc.progress}\n"
    state = proc.state
    # Nobody reports what is stopped at home, and the kernel knows.
    if state is ProcState.RUNNING and not proc.away and process_start(proc.pid)[0] == "T":
        state = ProcState.STOPPED
    if proc.owed is not None and state is not ProcState.ENDED:
        return f"{state.value}: {proc.owed.progress}\n"
    return f"{state.value}\n"


def _strict(proc: Process) -> str:
    return "yes\n" if proc.strict else "no\n"


async def _history(proc: Process) -> str:
    await proc.wait_landed()
    return "".join(
        f"{stay.node} {time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(stay.since))} "
        f"freeze_ms={stay.freeze_ms:.1f} bytes={stay.bytes}\n"
        for stay in proc.history
    ) + (f"{proc.status}: {proc.why}\n" if proc.why and proc.status is not None else "")


def parse_signal(text: str) -> int:
    """The number of a signal written as `TERM`, `SIGTERM` or `15`.

    Raises:
        BpfsError: EINVAL.
    """
    name = text.strip().upper()
    if name.isascii() and name.isdigit() and len(name) <= 2 and 0 < int(name) < signal.NSIG:
        return int(name)
    known = {member.name: member.value for member in signal.Signals}
    number = known.get(name) or known.get(f"SIG{name}")
    if number is None:
        raise BpfsError(EINVAL, f"'{text[:40]}' is no signal")
    return number
