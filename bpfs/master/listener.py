"""The master's port: who comes in, proves the key, and becomes a session or a stream. Everybody else is dropped
with one line."""

from __future__ import annotations

import socket
from contextlib import suppress
from errno import EMFILE, ENFILE, ENOBUFS, ENOMEM

import trio

from bpfs import log
from bpfs.errors import BpfsError, LinkClosed, ProtocolError
from bpfs.master.cluster import Cluster
from bpfs.nodes.admission import NotAdmitted
from bpfs.nodes.registry import Node
from bpfs.nodes.session import Session
from bpfs.wire.handshake import TIMEOUT, admit
from bpfs.wire.link import Link
from bpfs.wire.messages import Hello, Join, Refused, StreamOpen, Welcome
from engine.descriptors.model import boot_id
from engine.jobspace import Clocks

_log = log.get("wire")

BACKLOG = 1024
"""Connections that may wait for accept: a whole cluster coming up at once."""

MAX_STRANGERS = 1024
"""Connections that have not proved the key yet, at most; others are closed at once."""

PARK_TIME = 30.0
"""Seconds that a barred slave's connection is kept, so that it hears of its release; then it comes anew."""


def open_port(address: str, port: int) -> socket.socket:
    """The listening socket of the cluster's port; port 0: any free one.

    Raises:
        BpfsError: with a sentence.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise BpfsError(error.errno or 0, f"cannot listen on {address or '*'} port {port}: {error.strerror}") from None
    return sock


class Listener:
    """Serves the port."""

    def __init__(self, cluster: Cluster, sock: socket.socket) -> None:
        self._cluster = cluster
        self._sock = sock
        self._strangers = 0
        self._refusals: dict[int, str] = {}  # the last one of each number

    async def run(self) -> None:
        """Accept for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(self._sock)
                try:
                    conn, (host, port) = self._sock.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                except OSError as error:
                    if error.errno not in (EMFILE, ENFILE, ENOBUFS, ENOMEM):
                        raise
                    _log.error("cannot accept a connection: %s", error.strerror)
                    await trio.sleep(0.2)
                    continue
                if self._strangers >= MAX_STRANGERS:
                    _log.warning("%s port %d was dropped: too many connections without a proof", host, port)
                    conn.close()
                    continue
                nursery.start_soon(self._serve, conn, host, port, name=f"connection of {host}:{port}")

    async def _serve(self, conn: socket.socket, host: str, port: int) -> None:
        link = Link(conn, f"{host} port {port}")
        try:
            self._strangers += 1
            try:
                with trio.fail_after(TIMEOUT):
                    join = await self._identify(link)
            finally:
                self._strangers -= 1
            if join is not None:
                await self._welcome(link, join, host)
        except trio.TooSlowError:
            _log.warning("%s was dropped: no proof of the cluster key within %g s", link.name, TIMEOUT)
        except ProtocolError as error:
            _log.warning("%s was dropped: it %s", link.name, error)
        except LinkClosed as error:
            _log.warning("%s was dropped: %s", link.name, error)
        except Exception as error:
            # One connection's trouble is nobody else's.
            _log.error("%s was dropped", link.name, exc_info=error)
        finally:
            link.close("dropped")

    async def _identify(self, link: Link) -> Join | None:
        """A proved Join, or None where the connection is a stream and has been handed over."""
        first = await link.receive()
        if isinstance(first, StreamOpen):
            if not self._cluster.streams.arrive(first.token, link.detach()):
                link.reattach()
                raise ProtocolError("brought a stream that nobody expects")
            return None
        if not isinstance(first, Hello):
            raise ProtocolError(f"began with {type(first).__name__}")
        return await admit(link, self._cluster.key, first)

    async def _welcome(self, link: Link, join: Join, host: str) -> None:
        cluster = self._cluster
        if join.returns:
            await self._hear_out(join)
        try:
            node = cluster.admission.admit(join)
        except NotAdmitted as refusal:
            return await self._refuse(link, join, refusal, host)
        link.name = f"node {node.number}"
        cluster.nodes.set_address(node, host)
        session = Session(
            node, link, join, cluster.nodes, cluster.config, cluster.nursery, cluster.stage.up, cluster.is_idle
        )
        return await session.run(self._welcome_text(node, join), cluster.handlers)

    async def _hear_out(self, join: Join) -> None:
        """What its last life has sent comes before the next one."""
        node = self._cluster.nodes.find(join.wanted) if join.wanted is not None else None
        if node is not None and node.session is not None:
            with trio.move_on_after(TIMEOUT):
                await node.session.wait_ended()

    def _welcome_text(self, node: Node, join: Join) -> Welcome:
        config, block = self._cluster.config, self._cluster.blocks.of(node.number)
        clocks = Clocks.now()
        taken = {} if join.resumes else self._cluster.taken(node)
        return Welcome(
            node=node.number,
            lease=config.lease,
            heartbeat=config.heartbeat,
            block_first=block[0],
            block_last=block[-1],
            taken=tuple(taken),
            owners=tuple(taken.values()),
            mount=config.mount,
            cluster=self._cluster.succession.identity,
            boot=boot_id(),
            monotonic=clocks.monotonic,
            boottime=clocks.boottime,
            onlost=config.onlost,
            onlost_after=config.onlost_after,
            generation=self._cluster.succession.generation,
            heard=max(node.heard_reports, 0),
        )

    def _enter_refusal(self, number: int, text: str) -> None:
        # A refused slave comes again every few seconds: its line is entered once, until another is refused.
        if self._refusals.get(number) != text:
            self._refusals[number] = text
            self._cluster.logs.add(number, text)

    async def _refuse(self, link: Link, join: Join, refusal: NotAdmitted, host: str) -> None:
        level = _log.debug if refusal.parked else _log.warning
        level("%s (%s) was refused: %s", link.name, join.hostname, refusal.reason)
        if refusal.number >= 0 and not refusal.parked:
            self._enter_refusal(refusal.number, f"{host} ({join.hostname}) was refused: {refusal.reason}")
        await link.notify(Refused(refusal.reason, refusal.parked))
        if not refusal.parked:
            link.shutdown_sending()
            with trio.move_on_after(TIMEOUT):
                await link.wait_closed_by_peer()
            return
        with trio.move_on_after(PARK_TIME), suppress(LinkClosed):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_first, nursery, link.wait_closed_by_peer)
                nursery.start_soon(_first, nursery, self._cluster.admission.wait_unbarred, refusal.number)


async def _first(nursery: trio.Nursery, wait: object, *args: object) -> None:
    await wait(*args)  # type: ignore[operator]
    nursery.cancel_scope.cancel()
