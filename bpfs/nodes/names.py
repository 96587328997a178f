# SPDX-License-Identifier: GPL-2.0-or-later
"""Names of nodes (BeoNSS): in a file for this machine, and told to the nodes, whenever an address changes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import trio

from bpfs import hosts, log
from bpfs.errors import LinkClosed
from bpfs.nodes.registry import MASTER, Node, NodeTable
from bpfs.nodes.session import Session
from bpfs.nodes.states import NodeState
from bpfs.wire.messages import Names

_log = log.get("nodes")

GATHER = 0.2
"""Seconds for which changes are gathered: a thousand nodes that boot at once are told in a few messages each."""

_OF_INTEREST = ("address", "state")


class NodeNames:
    """Keeps a hosts file and the nodes up to date."""

    def __init__(self, nodes: NodeTable, path: Path) -> None:
        """Args:
        path: of the master's own file.
        """
        self._nodes = nodes
        self._path = path
        self._changed = trio.Event()
        self._known: dict[int, str] = {}  # addresses, as in the file
        self._told: dict[int, Session] = {}  # the sessions that have all of `_known`
        nodes.listen(self._hear)
        self._write("")

    def _hear(self, _node: Node, what: str) -> None:
        if what in _OF_INTEREST:
            self._changed.set()

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._changed.wait()
            await trio.sleep(GATHER)
            self._changed = trio.Event()
            self._look()

    def _look(self) -> None:
        now = {node.number: node.address for node in self._nodes if node.address}
        new = {number: address for number, address in now.items() if self._known.get(number) != address}
        if new:
            self._known = {int(number): address for number, address in now.items()}
            self._write(self._nodes.get(MASTER).address)
        changes, everything = Names(tuple(new.items())), Names(tuple(now.items()))
        for node in self._nodes:
            session = node.session
            if session is None or not node.state.linked or node.state is NodeState.BOOT:
                continue  # not there, or its jobs' root is still being made
            message = changes if self._told.get(node.number) is session else everything
            self._told[node.number] = session
            if message.addresses:
                with suppress(LinkClosed):
                    session.link.notify_nowait(message)

    def _write(self, master: str) -> None:
        try:
            hosts.write(self._path, hosts.text(self._known, master))
        except OSError as error:
            _log.error("no names of nodes for libnss_beo: %s: %s", self._path, error.strerror)
