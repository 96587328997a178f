"""The master's part in the nodes' view of its files: the server process, its streams, nodes/N/cache."""

from __future__ import annotations

import array
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from errno import ECONNRESET, EHOSTDOWN, EINVAL, EIO, ENOENT, EOPNOTSUPP

import msgpack
import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.master.cluster import Cluster
from bpfs.nodes.registry import MASTER, Node, NodeTable
from bpfs.nodes.states import NodeState
from bpfs.tree.entries import File, WriteRequest
from bpfs.tree.formats import lines
from bpfs.view.protocol import TOKEN_TIMEOUT
from bpfs.view.start import start
from bpfs.wire.messages import CacheCall, CacheReply, ViewOpen, ViewOpened

_log = log.get("view")

STATUS_TIMEOUT = 5.0
FETCH_TIMEOUT = 600.0
"""Seconds for a node to fetch what is to be prestaged."""


class FileServer:
    """The server process (bpfs.view.server), started when the first node asks, and again when it has died."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None

    def _ready(self) -> socket.socket:
        if self._sock is not None and self._process is not None and self._process.poll() is None:
            return self._sock
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = start("server", [theirs.fileno()])
        self._sock = ours
        self.export()
        return ours

    def take(self, stream: socket.socket) -> None:
        """Hand a node's stream over; it is closed here.

        Raises:
            BpfsError: the server cannot be started.
        """
        with stream:
            fds = array.array("i", [stream.fileno()])
            try:
                self._ready().sendmsg([b"s"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)], socket.MSG_NOSIGNAL)
            except OSError as error:
                raise BpfsError(EIO, f"the server of files does not run: {error.strerror}") from None

    def export(self) -> None:
        """Tell the server what the configuration says now."""
        if self._sock is not None:
            config = self._cluster.config
            self._sock.send(msgpack.packb([config.exports, [config.mount, str(config.key)]]))

    def close(self) -> None:
        """End the server."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class View:
    """Messages and files."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.server = FileServer(cluster)
        self._added: dict[str, None] = {}  # in order
        self._deleted: set[str] = set()  # of the configuration's

    @property
    def names(self) -> list[str]:
        """What nodes fetch when they come up: the configuration's, and what was added since."""
        config = self._cluster.config
        named = dict.fromkeys([*config.libraries, *config.prestage, *self._added])
        return [name for name in named if name not in self._deleted]

    def hear(self, node: Node, what: str) -> None:
        """Has a node that came up fetch what it should have before it needs it."""
        folders = self._cluster.config.libraries
        orders = [("libraries" if name in folders else "prestage", name) for name in self.names]
        if what == "state" and node.state is NodeState.UP and node.number != MASTER and orders:
            self._cluster.nursery.start_soon(self._prestage, node, orders, name=f"prestage of node {node.number}")

    async def _prestage(self, node: Node, orders: list[tuple[str, str]]) -> None:
        for verb, path in orders:
            try:
                await self._call(node, verb, path, FETCH_TIMEOUT)
            except BpfsError as error:
                if error.errno == EOPNOTSUPP:
                    return  # it has files of its own
                _log.warning("node %d did not fetch %s: %s", node.number, path, error)

    async def open(self, node: Node, _message: ViewOpen) -> ViewOpened:
        """Handler: a node wants a stream."""
        started = trio.Event()
        tokens: list[bytes] = []

        async def bring() -> None:
            with self._cluster.streams.expect() as stream:
                tokens.append(stream.token)
                started.set()
                try:
                    self.server.take(await stream.wait_connected(TOKEN_TIMEOUT))
                except BpfsError as error:
                    _log.warning("node %d: %s", node.number, error)

        self._cluster.nursery.start_soon(bring, name=f"view stream of node {node.number}")
        await started.wait()
        return ViewOpened(tokens[0], self._cluster.config.cachesize)

    def entry(self) -> File[Node]:
        """nodes/N/cache."""
        return File(
            "cache",
            "the node's object store; write purge, or prestage PATH",
            read=self._read,
            write=self._write,
            mode=0o644,
        )

    def libraries(self) -> File[NodeTable]:
        """The file libraries: BProc's list."""
        return File(
            "libraries",
            "what nodes fetch when they come up; write add PATH, delete PATH, clear",
            read=lambda _: lines(self.names),
            write=self._change,
            mode=0o644,
        )

    async def _change(self, _nodes: NodeTable, request: WriteRequest) -> None:
        verb, _, name = request.text.strip().partition(" ")
        name = name.strip()
        if (verb, bool(name)) not in (("add", True), ("delete", True), ("clear", False)):
            raise BpfsError(EINVAL, "write add PATH, delete PATH or clear")
        if verb == "clear":
            self._deleted |= set(self.names)
            self._added.clear()
        elif not name.startswith("/"):
            raise BpfsError(EINVAL, f"{name!r} is no absolute path")
        elif verb == "delete":
            if name not in self.names:
                raise BpfsError(ENOENT, f"{name} is not in the list")
            self._added.pop(name, None)
            self._deleted.add(name)
        else:
            await self._fetch_everywhere(name)
            self._deleted.discard(name)
            self._added[name] = None

    async def _fetch_everywhere(self, name: str) -> None:
        """Have all nodes that are up and keep the master's files fetch one; raises the first BpfsError of any."""
        failed: list[BpfsError] = []

        async def fetch(node: Node) -> None:
            try:
                await self._call(node, "prestage", name, FETCH_TIMEOUT)
            except BpfsError as error:
                if error.code not in (EOPNOTSUPP, EHOSTDOWN, ECONNRESET):  # own files; gone, and fetches later
                    failed.append(error)

        async with trio.open_nursery() as nursery:
            for node in self._cluster.nodes:
                if node.state is NodeState.UP:
                    nursery.start_soon(fetch, node)
        if failed:
            raise failed[0]

    async def _read(self, node: Node) -> str:
        if node.number == MASTER or node.session is None:
            return ""
        try:
            return await self._call(node, "status", "", STATUS_TIMEOUT)
        except BpfsError as error:
            if error.errno == EOPNOTSUPP:
                return ""  # it has files of its own
            raise

    async def _write(self, node: Node, request: WriteRequest) -> None:
        verb, _, argument = request.text.strip().partition(" ")
        argument = argument.strip()
        if (verb, bool(argument)) not in (("purge", False), ("prestage", True)):
            raise BpfsError(EINVAL, "write purge or prestage PATH")
        if verb == "prestage" and not argument.startswith("/"):
            raise BpfsError(EINVAL, f"{argument!r} is no absolute path")
        if node.number == MASTER:
            raise BpfsError(EOPNOTSUPP, "the master has its own files, and no cache of them")
        await self._call(node, verb, argument, FETCH_TIMEOUT)

    async def _call(self, node: Node, verb: str, argument: str, timeout: float) -> str:
        reply = await node.live_session().link.request(CacheCall(verb, argument), timeout)
        assert isinstance(reply, CacheReply)
        return reply.text


@asynccontextmanager
async def view(cluster: Cluster) -> AsyncIterator[View]:
    """The view for as long as the context lasts."""
    it = View(cluster)
    cluster.handle(ViewOpen, it.open)
    cluster.node_entries.append(it.entry())
    cluster.root_entries.append(it.libraries())
    cluster.nodes.listen(it.hear)
    try:
        yield it
    finally:
        it.server.close()
