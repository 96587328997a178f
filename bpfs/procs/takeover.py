"""Taking up what an earlier master has left: its ghosts at once, their processes as each node's slave comes back.

A ghost is known by its pid and start time; the ledger says what it stands for. Nodes have as long as their lease: who
has not come back by then has fenced its jobs. A move that was under way is off, as long as the source is there. Where
it is not, its copy on the other node counts, once that is back as well, if it runs: slaves undo what engines have not
finished when their master is gone.
"""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.nodes.blocks import Blocks
from bpfs.nodes.registry import MASTER, Node, NodeTable
from bpfs.nodes.session import Session
from bpfs.procs.away import UNCOUNTED, Away, carefully
from bpfs.procs.entries import Bound, Entry, bound_of, restored
from bpfs.procs.ghost import Ghost, take_heir
from bpfs.procs.ghosts import Ghosts
from bpfs.procs.leave import wait_untraced
from bpfs.procs.ledger import Part
from bpfs.procs.process import ExitStatus, ProcState
from bpfs.rundir import process_start
from bpfs.wire import messages
from bpfs.wire.streams import StreamBook
from engine.linux import procfs

REQUEST_TIMEOUT = 10.0  # seconds for a node to carry out what it is asked for
REPORTED_WITHIN = 2.0  # seconds from the end of a process to its report

_log = log.get("procs")


class Takeover:
    """Once a master, at its start."""

    def __init__(
        self, ghosts: Ghosts, nodes: NodeTable, blocks: Blocks, streams: StreamBook, nursery: trio.Nursery,
        silence: Callable[[], float],
    ) -> None:  # fmt: skip
        """Args:
        blocks: the pids of what was forked on a node, as opposed to moved there.
        silence: seconds after which a node that has not come back holds no job any more.
        """
        self._ghosts = ghosts
        self._nodes = nodes
        self._blocks = blocks
        self._streams = streams
        self._nursery = nursery
        self._silence = silence
        nodes.listen(self._node_changed)
        self._known: dict[int, trio.Event] = defaultdict(trio.Event)  # node -> set when it is back, or fenced
        self._alive: dict[int, set[int]] = {}  # node that is back -> what lived there then
        self._ownerless: set[int] = set()  # jobs whose ghosts were killed meanwhile, or never came to be
        self._torn: dict[int, Bound] = {}  # whose move from node to node was under way
        self._left: list[Away] = []  # those that have just left the master

    async def take_up(self) -> None:
        """Adopt all ghosts that still are there; from now on their nodes are expected back."""
        ledger = self._ghosts.ledger
        self._streams.last = ledger.left(Part.STREAMS).get(0, 0)
        self._streams.on_number = lambda number: ledger.put(Part.STREAMS, 0, number)
        entries: dict[int, Entry] = ledger.left(Part.AWAY)
        async with trio.open_nursery() as nursery:  # those that are traced are waited for all at once
            for pid, entry in entries.items():
                nursery.start_soon(carefully, pid, self._take_up(pid, entry))
        for child, parent in ledger.left(Part.CHILD).items():
            self._take_up_child(child, parent)
        for away in list(self._ghosts.all()):
            await carefully(away.proc.pid, self._end_unknown(away))
        for away in self._left:
            await carefully(away.proc.pid, self._part(away, MASTER))
        bound = {where.place for where in self._torn.values()}
        for number in bound | {int(away.proc.place) for away in self._ghosts.all()}:
            node = self._nodes.find(number) or self._nodes.add(number)
            self._nodes.set_doubtful(node)
            self._nursery.start_soon(self._expect, node, name=f"return of node {number}")
        if entries:
            _log.info("took up %d of the last master's %d ghosts", len(self._ghosts), len(entries))

    async def _take_up(self, pid: int, entry: Entry) -> None:
        proc, stdio = restored(pid, entry)
        bound, before = bound_of(entry), proc.state
        if not entry["real"]:
            self._ghosts.adopt_absent(proc)
            self._ghosts.table.add(proc)
            return
        if not _is_there(pid, proc.identity.start):
            self._forget(pid)
            return
        try:
            await wait_untraced(pid)  # whoever was at work on it is dying, and may be making the ghost anew
            ghost = await Ghost.adopt(pid)
        except BpfsError:
            self._forget(pid)  # it has never left, or has come home
            if proc.place != MASTER and bound is None:
                raise
            return
        away = Away(proc, ghost, stdio, known=self._known[int(proc.place)])
        away.stopped_by, away.stopped_after = entry["stopped_by"], entry["stopped_after"]
        away.asked_stop = before is ProcState.STOPPED
        if bound is not None and proc.place == MASTER:
            self._arrive(away, bound)
            away.known = self._known[bound.place]
            self._left.append(away)
        self._ghosts.take_charge(away)
        self._ghosts.table.add(proc)
        if bound is not None and proc.place != bound.place:
            proc.state, proc.settled, proc.progress = ProcState.MIGRATING, trio.Event(), "interrupted"
            away.known = trio.Event()
            self._torn[pid] = bound
            self._ghosts.reports.expect(proc, bound, stdio)
            self._nursery.start_soon(carefully, pid, self._resolve(away, bound, before), name=f"move of {pid}")

    def _take_up_child(self, child: int, parent: int) -> None:
        away = self._ghosts.stand_in(parent)
        if away is None:
            self._ghosts.ledger.drop(Part.CHILD, child)
            return
        self._ghosts.families.has_child(away, child)
        self._ghosts.families.heard[child] = UNCOUNTED

    async def _end_unknown(self, parent: Away) -> None:
        """Ghosts of children that the last master had just had made, and did not live to enter, would be in the way
        when their node tells of these children again."""
        for pid in procfs.children(parent.proc.pid):
            if self._ghosts.stand_in(pid) is not None or pid in self._ghosts.families.parents:
                continue
            with suppress(BpfsError, ProcessLookupError):  # it is no ghost, or has ended
                take_heir(pid).close()
                os.kill(pid, signal.SIGKILL)
                await parent.ghost.reap(pid)

    def _forget(self, pid: int) -> None:
        self._ownerless.add(pid)
        self._ghosts.ledger.drop(Part.AWAY, pid)

    async def _expect(self, node: Node) -> None:
        while node.doubtful:
            with trio.move_on_after(self._silence()):
                await node.wait_fenced()
            if node.doubtful and node.session is None:
                self._nodes.set_fenced(node)

    def _node_changed(self, node: Node, what: str) -> None:
        if what == "fenced":
            self._alive.pop(int(node.number), None)
            self._known[int(node.number)].set()

    # -- a node is back --------------------------------------------------------------------------------------------

    def resumed(self, node: Node, message: messages.Resumed) -> None:
        """Handler of Resumed; what was reported before it is dealt with before it."""
        self._ghosts.reports.after(partial(self._compare, node, node.session, message))

    async def _compare(self, node: Node, session: Session | None, message: messages.Resumed) -> None:
        number = int(node.number)
        alive, stopped = set(message.alive), set(message.stopped)
        self._alive[number] = alive
        for pid in sorted(alive):
            if not self._has_owner(pid, node):
                alive.discard(pid)
                await carefully(pid, self._kill(number, pid))
        self._nursery.start_soon(self._drop_unknown, number, message, name=f"remains of moves on node {number}")
        for away in self._ghosts.away_on(number):
            if away.proc.pid not in self._torn:
                await carefully(away.proc.pid, self._settle(away, alive, stopped))
        if node.session is not session:
            return  # lost again meanwhile
        self._nodes.set_certain(node, alive)
        self._known[number].set()

    def _has_owner(self, pid: int, node: Node) -> bool:
        """Whether its ghost lives, or never could be made. The last master may have died in the middle of a move: then
        the copy that nobody expects is the one that must not live."""
        proc = self._ghosts.table.known(pid)
        if proc is not None:
            expected = self._ghosts.reports.is_expected(pid, int(node.number))
            return proc.place == node.number or pid in self._torn or expected
        return pid in self._blocks.of(node.number) and pid not in self._ownerless

    async def _drop_unknown(self, number: int, message: messages.Resumed) -> None:
        """Closes what was made there for moves that never came about."""
        here = [away.stdio for away in self._ghosts.away_on(number)]
        streams = {stdio.stream for stdio in here} | {bound.stream for bound in self._torn.values()}
        files = set(message.held).difference(*(stdio.files.values() for stdio in here))
        try:
            if files:
                await self._nodes.get(number).live_session().link.notify(messages.FdClose(tuple(files)))
            for stream in set(message.broken) - streams:
                await self._request(number, messages.RelayDetach(stream))
        except BpfsError as error:
            _log.info("node %d: %s", number, error)

    async def _request(self, number: int, request: messages.Message) -> None:
        await self._nodes.get(number).live_session().link.request(request, REQUEST_TIMEOUT)

    async def _kill(self, number: int, pid: int) -> None:
        await self._request(number, messages.Signal(pid, signal.SIGKILL, 0, 0, 0, 0))

    async def _settle(self, away: Away, alive: set[int], stopped: set[int]) -> None:
        proc = away.proc
        if proc.state is ProcState.MIGRATING:
            return  # the migration waits to hear of it
        if proc.pid not in alive:
            self._nursery.start_soon(carefully, proc.pid, self._miss(away), name=f"end of process {proc.pid}")
        elif proc.pid in stopped and proc.state is ProcState.RUNNING:
            await self._ghosts.stopped(away, signal.SIGSTOP)
        elif proc.pid not in stopped and proc.state is ProcState.STOPPED:
            await self._ghosts.continued(away)

    async def _miss(self, away: Away) -> None:
        # The report of its end may be on its way; or the last master has had it, and died of it.
        proc, place = away.proc, away.proc.place
        with trio.move_on_after(REPORTED_WITHIN):
            await proc.ended.wait()
        if proc.status is None and proc.place == place and self._ghosts.stand_in(proc.pid) is away:
            _log.warning("process %d ended on node %d, and nobody knows how", proc.pid, place)
            await self._ghosts.end(proc, proc.doom or ExitStatus(signal=signal.SIGKILL))

    # -- moves that were under way -----------------------------------------------------------------------------------

    async def _resolve(self, away: Away, bound: Bound, before: ProcState) -> None:
        proc, source = away.proc, int(away.proc.place)
        await self._known[source].wait()
        await self._known[bound.place].wait()
        proc.state = before
        stays = proc.pid in self._alive.get(source, ())
        if not stays and bound.place in self._alive:
            self._arrive(away, bound)
            await carefully(proc.pid, self._part(away, source))
            await self._ghosts.reports.catch_up(proc)
        else:
            self._ghosts.reports.expect_no_more(proc)
        del self._torn[proc.pid]
        away.bound = None
        self._ghosts.note(away)
        if stays and proc.pid in self._alive.get(bound.place, ()):
            await carefully(proc.pid, self._kill(bound.place, proc.pid))
        assert away.known is not None
        away.known.set()
        proc.settled.set()
        if proc.pid not in self._alive.get(int(proc.place), ()):
            await self._miss(away)

    def _arrive(self, away: Away, bound: Bound) -> None:
        proc, stdio = away.proc, away.stdio
        stdio.stream, stdio.ends, stdio.files = bound.stream, bound.ends, {}
        proc.arrived(bound.place, 0.0, 0)
        proc.hostpid = 0  # which was that at its source
        _log.info("process %d has moved to node %d after all", proc.pid, bound.place)

    async def _part(self, away: Away, source: int) -> None:
        """It hears from afar of the children that it has left there, and they of it."""
        await self._ghosts.families.parted(away, source)
        await self._ghosts.families.keep_children(away, procfs.children(away.proc.pid))


def _is_there(pid: int, start: int) -> bool:
    state, started = process_start(pid)
    return state not in "ZX" and started == start
