"""What the master does with one slave, from welcome to the end of the link.

The lease, from both sides: a slave sends a heartbeat and notes when; the master answers it; with the answer the
slave may hold jobs until that moment plus the lease. The master in turn counts from when it last *heard* the slave,
which is never before the heartbeat was sent, and adds a margin: so when it declares a node dead, the slave's lease
is over, whatever the network did to either direction.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import trio

from bpfs import log
from bpfs.config import Config
from bpfs.errors import BpfsError, LinkClosed
from bpfs.nodes.registry import Node, NodeTable
from bpfs.nodes.states import Cause, NodeState
from bpfs.wire.link import Link, now
from bpfs.wire.messages import (
    Fault,
    Fence,
    Heartbeat,
    HeartbeatSeen,
    JobEvents,
    JobReport,
    Join,
    Leaving,
    Message,
    Ready,
    Sample,
    Welcome,
)

_log = log.get("nodes")

NodeHandler: TypeAlias = Callable[[Node, Any], "Message | Awaitable[Message | None] | None"]
NodeHandlers: TypeAlias = Mapping[type[Message], NodeHandler]

RESERVED = "unavailable by the administrator"

FENCE_TIMEOUT = 10.0
"""Seconds that a slave may take to kill its jobs on command; then its link is closed, and its lease is waited for."""

FIRST_AGAIN, LAST_AGAIN = 60.0, 600.0
"""Seconds after which the final stage of a node's start is tried again where it has failed, doubling."""


class Session:
    """The conversation with one slave."""

    def __init__(
        self,
        node: Node,
        link: Link,
        join: Join,
        table: NodeTable,
        config: Config,
        doubts: trio.Nursery,
        stage: Callable[[Node], Awaitable[None]],
        is_idle: Callable[[], bool] = lambda: True,
    ) -> None:
        """Args:
        doubts: outlives the session: there the lease of a lost slave is waited for.
        stage: what has to be done between a ready slave and `up`; raises BpfsError where it cannot be.
        is_idle: whether nothing is left to be done of all that slaves have reported of their jobs.
        """
        self.node = node
        self.link = link
        link.patience = config.nodetimeout
        self.door = 0
        self.real = join.real
        self.facts = join.facts
        self._resumes = bool(join.resumes)
        self._told_before = join.told  # number of the last report before this link
        self._finished = False  # its start is
        self._failures = 0  # of the final stage, one after the other
        self._nursery: trio.Nursery | None = None
        self._reports = 0  # that have come: JobReport, JobEvents
        self._taken = 0  # of which nothing is left to be done
        self._table = table
        self._config = config
        self._doubts = doubts
        self._stage = stage
        self._is_idle = is_idle
        self._left = ""  # why the slave left, once it said so (no job lives there any more)
        self._silent = False
        self._ended = trio.Event()

    async def run(self, welcome: Welcome, handlers: NodeHandlers) -> None:
        """Serve the slave until the link ends. `handlers` get the node and the message."""
        node, table = self.node, self._table
        own: dict[type[Message], Callable[..., Any]] = {
            Heartbeat: self._heartbeat,
            Ready: self._ready,
            Fault: self._fault,
            Sample: self._sample,
            Leaving: self._leaving,
        }
        if node.session is not None:
            node.session.supersede()
        bound: dict[type[Message], Callable[..., Any]] = {
            kind: partial(handler, node) for kind, handler in handlers.items()
        }
        bound |= {kind: self._count(bound[kind]) for kind in (JobReport, JobEvents) if kind in bound}
        node.session, node.real, node.runs_on = self, self.real, False
        # Of one that comes back with its jobs nobody knows what they are before it has told.
        if node.doubtful and not self._resumes:
            table.set_fenced(node)
        try:
            table.set_state(node, NodeState.BOOT, Cause.JOINED, "the slave makes its job space")
            table.set_reason(node, "the slave makes its job space")  # it was in this state where its machine booted
            self.link.notify_nowait(welcome)
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._watch_silence, name=f"silence of node {node.number}")
                await self.link.run(bound | own)
                nursery.cancel_scope.cancel()
        except LinkClosed:
            pass  # within the welcome; the end below is the same
        finally:
            self._end()

    async def wait_ended(self) -> None:
        """Wait until all that came over the link has been heard, and the node is known to be without it."""
        await self._ended.wait()

    @property
    def heard(self) -> float:
        """When the slave was last heard, seconds since the epoch."""
        return time.time() - (now() - self.link.heard)

    # -- what the slave says -----------------------------------------------------------------------

    def _heartbeat(self, message: Heartbeat) -> None:
        if self._is_idle():
            self._taken = self._reports
        with suppress(LinkClosed):
            self.link.notify_nowait(HeartbeatSeen(message.count, self._taken))

    def _count(self, handler: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def counted(message: Message) -> Any:
            self._reports += 1
            return handler(message)

        return counted

    async def _ready(self, message: Ready) -> None:
        self.node.init, self.door = message.init, message.door
        await self.finish()

    async def finish(self) -> None:
        """From `boot` to `up` (or unavailable, where the administrator wants that), by way of the final stage."""
        node, table = self.node, self._table
        if node.state is not NodeState.BOOT:
            return
        failure = ""
        try:
            if not self._resumes:
                await self._stage(node)
        except LinkClosed:
            return  # the end of the session tells
        except BpfsError as error:
            failure = error.sentence
            _log.warning("node %d: %s", node.number, failure)
        if node.state is not NodeState.BOOT or node.session is not self:
            return  # something else came in between
        if failure:
            table.set_state(node, NodeState.ERROR, Cause.FAULT, failure)
            self._failures += 1
            if self._nursery is not None:
                self._nursery.start_soon(self._finish_again, self._failures, name=f"another try of node {node.number}")
            return
        self._finished, self._failures = True, 0
        state = NodeState.UNAVAILABLE if node.reserved else NodeState.UP
        table.set_state(node, state, Cause.READY, RESERVED)
        _log.info("node %d is %s, at %s", node.number, state.value, node.address)

    async def _finish_again(self, failures: int) -> None:
        """What failed may have been slow, or not there yet, as a file server that starts with the master."""
        await trio.sleep(min(FIRST_AGAIN * 2 ** (failures - 1), LAST_AGAIN))
        if failures == self._failures and self.node.state is NodeState.ERROR and self.node.session is self:
            self._table.set_state(self.node, NodeState.BOOT, Cause.AGAIN, "its start is tried again")
            await self.finish()

    def _fault(self, message: Fault) -> None:
        if self.node.state.linked:
            _log.warning("node %d: %s", self.node.number, message.reason)
            self._table.set_state(self.node, NodeState.ERROR, Cause.FAULT, message.reason)

    def _sample(self, message: Sample) -> None:
        self._table.set_sample(self.node, message)

    def _leaving(self, message: Leaving) -> None:
        self._left = message.reason or "the slave left"

    # -- what the master does ----------------------------------------------------------------------

    async def fence(self, reason: str, then: str) -> None:
        """Have the slave kill its jobs, and end the session; returns when it has ended.

        Whether the jobs are known to be gone afterwards tells `node.doubtful`; `node.wait_fenced` waits for it.
        """
        try:
            await self.link.request(Fence(reason, then), FENCE_TIMEOUT)
            self._left = reason
        except BpfsError as error:
            _log.warning("node %d did not confirm that it was fenced: %s", self.node.number, error)
        self.link.close(reason)
        await self._ended.wait()

    def supersede(self) -> None:
        """The same slave has come again: it has killed its jobs, and this session is over."""
        self._left = "the slave started afresh"
        self._end()

    async def _watch_silence(self) -> None:
        # One wake-up per silence interval: it costs nothing with 1,000 links.
        while True:
            left = self.link.heard + self._config.silence - now()
            if left <= 0:
                break
            await trio.sleep(left)
        self._silent = True
        self.link.close(f"silent for {self._config.silence:g} s")

    def _end(self) -> None:
        self.link.close("the master ends the session")
        if self.node.session is self:
            self._leave()
        # Else a new one has taken over, and has dealt with the node.
        self._ended.set()

    def _leave(self) -> None:
        node, table = self.node, self._table
        if self._reports:
            node.heard_reports = self._told_before + self._reports
        elif not self._resumes:
            node.heard_reports = 0
        if not (self._finished or self._resumes):
            node.heard_reports = -1
        node.heard_last = self.heard
        node.session, node.init = None, 0
        reason = self._left or self.link.reason
        node.runs_on = not self._left and self._config.onlost == "continue" and node.holds_jobs
        if node.runs_on:
            reason += "; what runs there runs on to its end"
        if node.state is not NodeState.DOWN:
            ending = not node.state.linked
            cause = Cause.LEFT if self._left else Cause.LOST
            table.set_state(node, NodeState.DOWN, cause, node.reason if ending else reason)
            _log.info("node %d is down: %s", node.number, node.reason)
        if self._left or self._silent:
            table.set_fenced(node)
        else:
            table.set_doubtful(node)
            self._doubts.start_soon(self._wait_doubt, name=f"lease of node {node.number}")

    async def _wait_doubt(self) -> None:
        # Ends early where the same slave comes back: `run` of its new session says so.
        node = self.node
        while node.doubtful:
            left = self.link.heard + self._config.silence - now()
            if left <= 0:
                if node.session is None:  # else its slave is back, and about to tell what it has
                    self._table.set_fenced(node)
                return
            with trio.move_on_after(left):
                await node.wait_fenced()
