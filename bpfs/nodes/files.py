# SPDX-License-Identifier: GPL-2.0-or-later
"""The files of the root of /bpfs and of nodes/N: tables on top of the node table.

Formats, modes and errors are described in bpfs(5); a test holds page and tables together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cache, partial

import trio

from bpfs.figures import figure
from bpfs.nodes.admin import Administrator
from bpfs.nodes.attributes import NodeAttributes
from bpfs.nodes.events import EventLog
from bpfs.nodes.nodelog import NodeLog
from bpfs.nodes.registry import MASTER, Node, NodeTable
from bpfs.nodes.states import parse_state
from bpfs.sample import Sampler
from bpfs.tree.base import Caller, Changes
from bpfs.tree.entries import Access, Collection, Entry, File, Link, Table, WriteRequest
from bpfs.tree.formats import (
    group_name,
    key_values,
    lines,
    number_of_name,
    parse_group,
    parse_permissions,
    parse_user,
    permissions,
    user_name,
    value,
)
from bpfs.tree.local import LocalTree
from bpfs.wire.messages import Figure, FigureIs, Sample

ASK_TIMEOUT = 5.0
"""Seconds for a node to tell a figure that is asked for."""


class NodeFiles:
    """Makes the root table.

    Args:
        nodes: the table of nodes, which is also the object that functions in the root table get.
        administrator: carries out what is written to state files.
        node_entries: more files for nodes/N; their functions get the `Node`.
        root_entries: more files for the root; their functions get the `NodeTable`.
    """

    def __init__(
        self,
        nodes: NodeTable,
        administrator: Administrator,
        node_entries: Iterable[Entry[Node]] = (),
        root_entries: Iterable[Entry[NodeTable]] = (),
    ) -> None:
        self.nodes = nodes
        self._administrator = administrator
        self.node_table = self._make_node_table().extended(*node_entries)
        self.root_table = self._make_root_table().extended(*root_entries)

    def attach(self, tree: LocalTree) -> None:
        """Has a tree made of `root_table` tell its mounts of every change."""

        def tell(node: Node, what: str) -> None:
            # Figures come all the time, and no attribute of a file depends on them.
            if what != "sample":
                tree.changed("nodes", str(node.number))

        self.nodes.listen(tell)

    # -- tables -------------------------------------------------------------------------------------------------

    def _make_root_table(self) -> Table[NodeTable]:
        return Table(
            Link("self", "the node this is", target=lambda _, caller: f"nodes/{caller.node}"),
            Link("master", "the master's own directory", target=lambda _, caller: f"nodes/{MASTER}"),
            File("status", "a line a node: number state mode owner group address", read=_status),
            File("events", "blocks: a line an event, from the opening on", follow=lambda nodes: _follow(nodes.events)),
            Collection(
                "nodes",
                "a directory a node; -1 is the master",
                names=lambda nodes: map(str, nodes.numbers),
                lookup=_find,
                table=self.node_table,
                member_access=lambda node: Access(node.uid, node.gid, 0o555),
                member_change=self._change,
                member_notes=NodeAttributes(),
            ),
        )

    def _make_node_table(self) -> Table[Node]:
        nodes = self.nodes
        return Table(
            File(
                "state",
                "down boot unavailable up error reboot halt pwroff",
                read=lambda node: value(node.state.value),
                write=self._set_state,
                mode=0o644,
                sized=True,
            ),
            File("reason", "why it is not up, in a sentence", read=_reason, sized=True),
            File(
                "owner",
                "the user whose node it is",
                read=lambda node: value(user_name(node.uid)),
                write=lambda node, request: nodes.set_owner(node, parse_user(request.text)),
                mode=0o644,
            ),
            File(
                "group",
                "its group",
                read=lambda node: value(group_name(node.gid)),
                write=lambda node, request: nodes.set_group(node, parse_group(request.text)),
                mode=0o644,
            ),
            File(
                "mode",
                "who may migrate there: x bits",
                read=lambda node: value(permissions(node.mode)),
                write=lambda node, request: nodes.set_mode(node, parse_permissions(request.text)),
                # As with chmod(2): the owner may, too.
                access=lambda node: Access(node.uid, node.gid, 0o644),
                sized=True,
            ),
            File("load", "as /proc/loadavg of the node", read=partial(_figure, lambda it: value(it.load.strip()))),
            File("memory", "key value, in kB", read=partial(_figure, lambda it: key_values(it.memory))),
            File("cpus", "how many processors", read=partial(_figure, lambda it: value(it.cpus))),
            File("mhz", "their clock", read=partial(_figure, lambda it: value(f"{it.mhz:g}") if it.mhz else "")),
            File("stat", "its processors and processes, as in /proc/stat", read=partial(_figure, _processors)),
            File("busy", "a line a processor: the share of the last seconds that it was busy", read=_busy),
            File("disk", "its root file system, as statfs(2)", read=partial(_asked, "disk")),
            File("netdev", "as /proc/net/dev of the node", read=partial(_asked, "netdev")),
            File("uptime", "seconds since it started", read=partial(_figure, lambda it: f"{it.uptime:.2f}\n")),
            File("kernel", "the release of its kernel", read=partial(_figure, lambda it: value(it.kernel))),
            File("heard", "seconds since 1970 when it was last heard of", read=_heard),
            File("address", "its address", read=lambda node: value(node.address), sized=True),
            File(
                "events",
                "blocks: a line an event of this node, from the opening on",
                follow=lambda node: _follow(nodes.events, node.number),
            ),
        )

    # -- writes -------------------------------------------------------------------------------------------------

    async def _set_state(self, node: Node, request: WriteRequest) -> None:
        await self._administrator.set_state(node, parse_state(request.text))

    def _change(self, node: Node, caller: Caller, changes: Changes) -> None:
        """chown, chgrp and chmod of nodes/N: as `owner`, `group`, `mode`; the kernel has checked who may."""
        if changes.uid is not None:
            self.nodes.set_owner(node, changes.uid)
        if changes.gid is not None:
            self.nodes.set_group(node, changes.gid)
        if changes.mode is not None:
            # The directory's own r and x bits are for reading its files; of what chmod says, only x means something.
            self.nodes.set_mode(node, changes.mode & 0o111)


def log_file(logs: NodeLog) -> File[Node]:
    """nodes/N/log."""
    return File("log", "its boot, its states, and what node_up printed", read=lambda node: logs.text(node.number))


def migrate_access(node: Node) -> Access:
    """Access to nodes/N/migrate: its w bits are the node's x bits, so that the kernel itself refuses."""
    return Access(node.uid, node.gid, 0o444 | (node.mode & 0o111) << 1)


# -- reads ------------------------------------------------------------------------------------------------------------


def _find(nodes: NodeTable, name: str) -> Node | None:
    number = number_of_name(name)
    return nodes.find(number) if number is not None else None


def _status(nodes: NodeTable) -> str:
    # A thousand nodes have few owners.
    user, group = cache(user_name), cache(group_name)
    return lines(
        f"{node.number} {node.state.value} {permissions(node.mode)} {user(node.uid)} {group(node.gid)}"
        f" {node.address or '-'}"
        for node in nodes
    )


def _reason(node: Node) -> str:
    return value(node.reason) if node.reason else ""


def _processors(sample: Sample) -> str:
    total = [sum(column) for column in zip(*(ticks for _, *ticks in sample.processors), strict=True)]
    found = [("cpu ", total), *((f"cpu{number}", ticks) for number, *ticks in sample.processors)]
    return lines(f"{name} {' '.join(map(str, ticks))}" for name, ticks in found) + key_values(sample.counters)


def _busy(node: Node) -> str:
    # The master's own as well: it is always of the last seconds, however seldom somebody reads.
    return lines(f"{share:.2f}" for share in node.sample.busy) if node.sample else ""


def _heard(node: Node) -> str:
    when = time.time() if node.number == MASTER else node.heard
    return f"{when:.2f}\n" if when else ""


@cache
def _own() -> Sampler:
    # Opened at the first look, not at import: a daemon closes what it was born with.
    return Sampler()


def _figure(show: Callable[[Sample], str], node: Node) -> str:
    """What a node's last figures say, the master's own being those of now; nothing where there are none yet."""
    sample = _own().take() if node.number == MASTER else node.sample
    return show(sample) if sample is not None else ""


async def _asked(name: str, node: Node) -> str:
    """A figure of bpfs/figures.py, as it is now. Raises BpfsError."""
    if node.number == MASTER:
        return await trio.to_thread.run_sync(figure, name, abandon_on_cancel=True)
    reply = await node.live_session().link.request(Figure(name), ASK_TIMEOUT)
    assert isinstance(reply, FigureIs)
    return reply.text


class _Follower:
    """Texts of events from its making on; all there are at a time."""

    def __init__(self, log: EventLog, node: int | None) -> None:
        self._log = log
        self._node = node
        self._seen = log.last

    async def __anext__(self) -> str:
        text = ""
        while not text:
            events = await self._log.wait_since(self._seen)
            lost = self._log.lost(self._seen)
            self._seen = self._log.last
            text = lines(event.text for event in events if self._node in (None, event.node))
            if lost:
                text = f"lost {lost}\n{text}"
        return text

    async def aclose(self) -> None:
        """Nothing to give back: the log keeps no account of readers."""


def _follow(log: EventLog, node: int | None = None) -> _Follower:
    return _Follower(log, node)
