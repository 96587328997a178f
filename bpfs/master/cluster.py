"""What the master knows and has, in one object: the other rooms are handed this, and hang their own parts into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from bpfs.config import Config
from bpfs.engines import Workers
from bpfs.master.succession import Succession
from bpfs.nodes.admin import Administrator
from bpfs.nodes.admission import Admission
from bpfs.nodes.blocks import Blocks
from bpfs.nodes.events import EventLog
from bpfs.nodes.nodelog import NodeLog
from bpfs.nodes.power import Power
from bpfs.nodes.registry import MASTER, Node, NodeTable
from bpfs.nodes.session import NodeHandler
from bpfs.nodes.stage import Stage
from bpfs.nodes.states import NodeState
from bpfs.tree.entries import Entry
from bpfs.tree.local import LocalTree
from bpfs.wire.messages import Message
from bpfs.wire.streams import StreamBook


@dataclass(slots=True)
class Cluster:
    """One cluster as its master sees it. Belongs to the trio thread."""

    config: Config
    key: bytes
    workers: Workers
    nursery: trio.Nursery  # for tasks that last as long as the master
    events: EventLog = field(default_factory=EventLog)
    logs: NodeLog = field(default_factory=NodeLog)
    streams: StreamBook = field(default_factory=StreamBook)
    blocks: Blocks = field(default_factory=Blocks)
    handlers: dict[type[Message], NodeHandler] = field(default_factory=dict)
    """What is done with messages of slaves, beside what sessions do themselves: called with the node and the
    message."""
    node_entries: list[Entry[Node]] = field(default_factory=list)
    """More files for nodes/N; to be there before the tree is mounted."""
    root_entries: list[Entry[NodeTable]] = field(default_factory=list)
    """More files for the root; to be there before the tree is mounted."""
    tree: LocalTree | None = None
    ending: bool = False  # told to end, and all jobs with it
    succession: Succession = field(default_factory=Succession)
    idle: list[Callable[[], bool]] = field(default_factory=list)
    """What is to be true when nothing is left to be done of what slaves have reported."""
    taken: Callable[[Node], dict[int, int]] = lambda _: {}
    """Real uids, by pid, of processes elsewhere that have pids of a node which starts afresh."""
    nodes: NodeTable = field(init=False)
    admission: Admission = field(init=False)
    stage: Stage = field(init=False)
    administrator: Administrator = field(init=False)

    def __post_init__(self) -> None:
        self.events.listen(self.logs.add_event)
        self.nodes = NodeTable(self.events, self.config.nodes)
        self.admission = Admission(self.nodes, lambda: self.config, self.succession.takes_up, self.succession.is_own)
        self.stage = Stage(self.nodes, self.logs, lambda: self.config)
        power = Power(self.nodes, self.admission, lambda: self.config, self.stage.run_step, self.nursery)
        self.administrator = Administrator(self.nodes, self.admission, self.stage, power)
        master = self.nodes.add(MASTER)
        self.nodes.enter(master, NodeState.UP)

    def is_idle(self) -> bool:
        """Whether nothing is left to be done of what slaves have reported of their jobs."""
        return all(is_idle() for is_idle in self.idle)

    def handle(self, kind: type[Message], handler: Callable[..., Any]) -> None:
        """Have `handler(node, message)` called for messages of this type from slaves (see bpfs.wire.link for its
        nature)."""
        assert kind not in self.handlers, f"two handlers for {kind.__name__}"
        self.handlers[kind] = handler

    def reconfigure(self, config: Config) -> None:
        """Take a configuration that was read again; what needs a restart (port, interface, mount, key, state) stays."""
        for name in ("interface", "address", "port", "mount", "key", "state"):
            setattr(config, name, getattr(self.config, name))
        self.config = config
        self.nodes.limit = config.nodes
        for node in self.nodes:
            if node.link is not None:
                node.link.patience = config.nodetimeout
        for entry in config.entries:
            if entry.number not in self.nodes and entry.number < config.nodes:
                self.nodes.add(entry.number)
