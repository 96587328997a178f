# SPDX-License-Identifier: GPL-2.0-or-later
"""Which ghosts are shown to unmodified ps and top as what they stand for, and the figures for it.

`bpfs.procs.covers` does it in /proc; here is the master's side: it says which, and asks the nodes when somebody looks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import suppress

import trio

from bpfs import log
from bpfs.config import PSVIEW_MOST
from bpfs.errors import BpfsError
from bpfs.nodes.registry import NodeTable
from bpfs.procs.away import Away
from bpfs.procs.covers import PATIENCE, Covers, Word, pack, sweep, unpack
from bpfs.procs.ghosts import Ghosts
from bpfs.procs.kernelfiles import ANSWER_S
from bpfs.procs.process import MASTER, Process
from bpfs.procs.pstext import FILES
from bpfs.tree.base import WriteRequest
from bpfs.tree.entries import File
from bpfs.tree.formats import key_values, parse_number
from bpfs.wire.messages import JOBS_AT_ONCE, JobsStatus, JobsStatusAre

_GATHER = 0.1  # seconds between a change and what is done for it: processes that end sooner are never covered
_ANSWER = PATIENCE * 2 / 3  # seconds for all nodes; the rest is for what they have said
_BARE_WITHIN = 1.0  # seconds for the covers of one ghost to go; it takes one or two milliseconds
_CLOSE_WITHIN = 5.0  # seconds for all covers to go; 4096 ghosts take about 4
_BACK_AT = 3 / 4  # of the limit: so few ghosts have to be left before they are covered again
_PACKET = 1 << 12

_log = log.get("procs")


class PsView:
    """The view that everybody on the master has of the cluster's processes."""

    def __init__(self, covers: Covers, ghosts: Ghosts, nodes: NodeTable, limit: int) -> None:
        """`limit`: ghosts up to which they are covered; 0: never."""
        self._covers = covers
        self._socket = trio.socket.from_stdlib_socket(covers.socket)
        self._ghosts = ghosts
        self._nodes = nodes
        self._configured = self._limit = limit
        self._covered: dict[int, Away] = {}
        self._crowded = False
        self._homing: dict[int, trio.Event] = {}  # come home just now: set when they are bare
        self._changed = trio.Event()
        self._told: dict[int, float] = {}  # node -> time.monotonic() of its last figures
        self._silent: set[int] = set()  # did not answer in time when somebody looked last
        self._asking: set[int] = set()
        self._trouble = ""
        self._sending = trio.Lock()  # a socket takes one that waits for room

    async def run(self) -> None:
        """Works for as long as the master does."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow)
            nursery.start_soon(self._listen, nursery)

    async def close(self) -> None:
        """Takes all covers away."""
        self._socket.close()
        with trio.move_on_after(_CLOSE_WITHIN):
            await trio.to_thread.run_sync(self._covers.close, abandon_on_cancel=True)

    def poke(self) -> None:
        """Some process has changed its place, come or gone."""
        self._changed.set()

    def configure(self, limit: int) -> None:
        """Takes the limit of a configuration that was read again."""
        if limit != self._configured:
            self._configured = self._limit = limit
            self.poke()

    # -- which -----------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while not self._trouble:
            await self._changed.wait()
            await trio.sleep(_GATHER)
            self._changed = trio.Event()
            await self._apply()

    async def _apply(self) -> None:
        wanted = self._wanted()
        for pid in [pid for pid, away in self._covered.items() if wanted.get(pid) is not away]:
            del self._covered[pid]
            await self._tell(Word.BARE, pid)
        for pid in wanted.keys() - self._covered.keys():
            self._covered[pid] = wanted[pid]
            await self._tell(Word.COVER, pid)

    def _wanted(self) -> dict[int, Away]:
        found: dict[int, Away] = {}
        most = self._limit * _BACK_AT if self._crowded else self._limit
        for away in self._ghosts.all():
            if self._can_be_covered(away):
                found[away.proc.pid] = away
                if len(found) > most:  # however many more there are
                    self._crowded = True
                    return {}
        self._crowded = False
        return found

    def _can_be_covered(self, away: Away) -> bool:
        proc = away.proc
        here = away.real and not away.ghost.gone and proc.pid not in self._homing
        return here and proc.away and proc.status is None

    async def before_home(self, proc: Process) -> None:
        """The process is about to come home: from now on /proc shows itself. Until `home`."""
        self._homing[proc.pid] = bare = trio.Event()
        if self._covered.pop(proc.pid, None) is not None:
            await self._tell(Word.BARE, proc.pid)
            with trio.move_on_after(_BARE_WITHIN):
                await bare.wait()

    def home(self, proc: Process) -> None:
        """The move home has ended, or failed."""
        del self._homing[proc.pid]
        self.poke()

    async def _tell(self, word: Word, *items: object) -> None:
        if self._trouble:
            return
        with suppress(OSError, trio.ClosedResourceError):  # `_listen` finds out
            async with self._sending:
                await self._socket.send(pack(word, *items))

    # -- figures ---------------------------------------------------------------------------------------------------

    async def _listen(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                packet = await self._socket.recv(_PACKET)
            except trio.ClosedResourceError:
                return
            except OSError:
                packet = b""
            if not packet:
                await self._fail("what covers /proc has ended; it starts with bpmaster")
                return
            word, items = unpack(packet)
            match word:
                case Word.LOOK:
                    nursery.start_soon(self._look, nursery)
                case Word.BARE if items[0] in self._homing:
                    self._homing[items[0]].set()
                case Word.TROUBLE:
                    await self._fail(items[0])

    async def _fail(self, sentence: str) -> None:
        if self._trouble:
            return
        self._trouble = sentence
        _log.warning("ps and top show ghosts as they are: %s", sentence)
        pids = list(self._covered)
        self._covered.clear()
        self._socket.close()
        await trio.to_thread.run_sync(self._covers.close)
        await trio.to_thread.run_sync(sweep, pids, self._covers.folder)

    async def _look(self, nursery: trio.Nursery) -> None:
        places = defaultdict(list)
        for pid, away in self._covered.items():
            places[away.proc.place].append(pid)
        places.pop(MASTER, None)
        self._silent.intersection_update(places)
        waited = [node for node in places if node not in self._silent and node not in self._asking]
        heard = {node: trio.Event() for node in places}
        for node in places.keys() - self._asking:
            nursery.start_soon(self._ask, node, places[node], heard[node])
        with trio.move_on_after(_ANSWER):
            for node in waited:
                await heard[node].wait()
        self._silent |= {node for node in places if not heard[node].is_set()}
        await self._tell(Word.SHOWN)

    async def _ask(self, node: int, pids: list[int], heard: trio.Event) -> None:
        self._asking.add(node)
        try:
            link = self._nodes.get(node).live_session().link
            for first in range(0, len(pids), JOBS_AT_ONCE):
                some = tuple(pids[first : first + JOBS_AT_ONCE])
                reply = await link.request(JobsStatus(some, FILES), ANSWER_S)
                assert isinstance(reply, JobsStatusAre)
                texts = iter(reply.texts)
                for pid, *of_pid in zip(some, texts, texts, texts, strict=True):
                    if of_pid[0] and pid in self._covered:
                        await self._tell(Word.SHOW, pid, *of_pid)
            self._told[node] = time.monotonic()
            self._silent.discard(node)
            heard.set()
        except BpfsError as error:
            _log.debug("node %d does not tell of its processes: %s", node, error)
        finally:
            self._asking.discard(node)

    # -- the file --------------------------------------------------------------------------------------------------

    def entry(self) -> File[NodeTable]:
        """The file `psview` of the tree's root."""
        return File(
            "psview",
            "whether ps and top of everybody here show what processes do on nodes; write on, off or a limit",
            read=lambda _: self.render(),
            write=lambda _, request: self._write(request),
            mode=0o644,
        )

    def render(self) -> str:
        """`key value` lines."""
        items: list[tuple[str, object]] = [
            ("shown_to", "everybody" if self._covered or self._would_cover() else "bpps"),
            ("limit", self._limit),
            ("covered", len(self._covered)),
        ]
        now = time.monotonic()
        for node in sorted(self._silent):
            since = f"{now - self._told[node]:.1f}" if node in self._told else "never"
            items.append(("stale", f"{node} {since}"))
        if self._trouble:
            items.append(("trouble", self._trouble))
        return key_values(items)

    def _would_cover(self) -> bool:
        return self._limit > 0 and not self._crowded and not self._trouble

    async def _write(self, request: WriteRequest) -> None:
        known = {"off": 0, "on": self._configured or PSVIEW_MOST}
        text = request.text.strip()
        limit = known[text] if text in known else parse_number(text, 0, PSVIEW_MOST, "limit, on or off")
        self._limit, self._crowded = limit, False
        await self._apply()
