"""Where processes live: the master, or a node. One way to ask for an engine, whatever the place."""

from __future__ import annotations

import errno
import itertools
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

import trio

from bpfs.engines import EngineSession, Workers, pack_call, unpack_reply
from bpfs.errors import BpfsError, LinkClosed
from bpfs.nodes.registry import Node
from bpfs.procs.process import MASTER, Process
from bpfs.wire import messages
from bpfs.wire.link import Link
from engine.facts import facts

HANDLES = "handles"  # in a node's reply: what the slave calls the descriptors that came with it
HAND_OUT = "hand_out"  # the operation whose descriptors are the caller's, on the master as well
# Operations that may take long.
BULK = ("send", "receive", "follow", "give", "keep_image", "stage", "gather", "give_kin", "take_kin")
LOOPBACK = "127.0.0.1"
BULK_TIMEOUT = 3600.0  # seconds


class Engine(Protocol):
    """One engine worker, here or on a node, driven by the operations of engine/worker.py."""

    async def call(self, op: str, fds: Sequence[int] = (), **args: Any) -> dict[str, Any]:
        """Runs one operation. `fds` are descriptors of the place (on a node: handles of the slave's).

        Raises:
            BpfsError: the worker's errno and sentence; EIO where it died, EHOSTDOWN where its node went.
        """


class Place(Protocol):
    """A place where processes run."""

    async def drop(self, fds: Sequence[int]) -> None:
        """Closes descriptors of the place, those that are open still."""

    async def wake(self, proc: Process) -> None:
        """Sends SIGCONT to a process that is here. Raises BpfsError."""

    number: int
    facts: bytes
    """Of engine/facts.py."""

    def engine(self) -> AbstractAsyncContextManager[Engine]:
        """A worker for one move. Leaving the context undoes whatever was not finished."""

    def target(self, pid: int) -> dict[str, int]:
        """Where an engine there makes a process: the `place` of its operation prepare."""

    def address(self, peer: Place) -> str:
        """The address at which `peer` reaches engines of this place."""

    async def hostpid(self, proc: Process) -> int:
        """The pid by which engines of this place know a process that is here."""


class MasterPlace:
    """The master itself."""

    number = MASTER

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.facts = facts()

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        """A worker of the master's own zygote."""
        async with self._workers.open() as session:
            yield _LocalEngine(session)

    async def wake(self, proc: Process) -> None:
        """By kill(2)."""
        with suppress(ProcessLookupError):
            os.kill(proc.pid, signal.SIGCONT)

    async def drop(self, fds: Sequence[int]) -> None:
        """They are the master's own."""
        for fd in fds:
            os.close(fd)

    def target(self, pid: int) -> dict[str, int]:
        """On the master a process is made in its ghost's place."""
        return {"ghost": pid}

    def address(self, peer: Place) -> str:
        """The address that the peer's slave uses for this master."""
        return peer.master_address if isinstance(peer, NodePlace) else LOOPBACK

    async def hostpid(self, proc: Process) -> int:
        """The master's pids are the cluster's."""
        return proc.pid


class _LocalEngine:
    def __init__(self, session: EngineSession) -> None:
        self._session = session

    async def call(self, op: str, fds: Sequence[int] = (), **args: Any) -> dict[str, Any]:
        reply, received = await self._session.call(op, fds, **args)
        if op == HAND_OUT:
            reply[HANDLES] = received
            return reply
        for fd in received:
            os.close(fd)
        return reply


class NodePlace:
    """A node that is up."""

    _sessions = itertools.count(1)

    def __init__(self, node: Node) -> None:
        """Raises BpfsError EHOSTDOWN."""
        session = self._session = node.live_session()
        self.number = int(node.number)
        self.node = node
        self.link: Link = session.link
        self.door = session.door
        self.facts = session.facts
        self.master_address: str = self.link.local_address

    async def outlives(self, pid: int) -> bool:
        """Whether a process lives there after the link was lost: waits until the node is back with its jobs, or none of
        them can be alive."""
        await self._session.wait_ended()
        await self.node.wait_fenced()
        return pid in self.node.kept

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        """A worker of the node's slave, over the link."""
        number = next(self._sessions)
        engine = _RemoteEngine(self.link, number, self.number)
        # Not waited for: the slave takes what comes over a link in order, and the first call tells of a failure.
        await engine.notify(messages.EngineOpen(number))
        try:
            yield engine
        finally:
            # The slave closes the sessions of a lost link by itself.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5), suppress(LinkClosed):
                await self.link.notify(messages.EngineClose(number))

    async def wake(self, proc: Process) -> None:
        """By its slave."""
        await self.link.request(messages.Signal(proc.pid, signal.SIGCONT, 0, 0, 0, 0))

    async def drop(self, fds: Sequence[int]) -> None:
        """They are handles of the slave's; those that a call was given are gone already."""
        with suppress(LinkClosed):
            await self.link.notify(messages.FdClose(tuple(fds)))

    def target(self, pid: int) -> dict[str, int]:
        """On a node a process is made below the init of the job space."""
        return {"init": self.node.init}

    def address(self, peer: Place) -> str:
        """The node's own address, for the master and for other nodes."""
        return self.node.address

    async def hostpid(self, proc: Process) -> int:
        """What was moved here has told it; the slave knows the rest."""
        if proc.hostpid:
            return proc.hostpid
        reply = await self.link.request(messages.HostPidOf(proc.pid), self.link.patience)
        assert isinstance(reply, messages.HostPidIs)
        if not reply.hostpid:
            raise BpfsError(errno.ESRCH, f"there is no process {proc.pid} on node {self.number}")
        return reply.hostpid


class _RemoteEngine:
    def __init__(self, link: Link, session: int, node: int) -> None:
        self._link = link
        self._session = session
        self._node = node

    async def request(self, message: messages.Message, timeout: float | None) -> messages.Message:
        try:
            reply: messages.Message = await self._link.request(message, timeout)
            return reply
        except LinkClosed as error:
            raise BpfsError(errno.EHOSTDOWN, f"node {self._node} was lost: {error.sentence}") from error

    async def notify(self, message: messages.Message) -> None:
        try:
            await self._link.notify(message)
        except LinkClosed as error:
            raise BpfsError(errno.EHOSTDOWN, f"node {self._node} was lost: {error.sentence}") from error

    async def call(self, op: str, fds: Sequence[int] = (), **args: Any) -> dict[str, Any]:
        body = pack_call(op, args)
        timeout = BULK_TIMEOUT if op in BULK or "depart" in args else self._link.patience
        answer = await self.request(messages.EngineCall(self._session, body, tuple(fds)), timeout)
        assert isinstance(answer, messages.EngineReply)
        reply = unpack_reply(answer.body)
        reply[HANDLES] = list(answer.fds)
        return reply
