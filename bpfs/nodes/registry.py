"""The table of nodes: what the master knows of each, and who is told when that changes.

All of it belongs to the trio thread; nothing here waits. A change is made by a method of the table, which checks
it, posts an event and calls the listeners, so that nobody can change a node silently.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from errno import EEXIST, EHOSTDOWN, EINVAL, ENOENT, ENOSPC
from typing import TYPE_CHECKING, NewType

import trio

from bpfs.errors import BpfsError
from bpfs.nodes.events import EventLog
from bpfs.nodes.states import Cause, NodeState, check
from bpfs.wire.messages import Sample

if TYPE_CHECKING:
    from bpfs.nodes.session import Session
    from bpfs.wire.link import Link

NodeId = NewType("NodeId", int)

MASTER = NodeId(-1)
"""Number of the master, which is a node like any other to those who move processes."""

DEFAULT_MODE = 0o111
"""Execute bits of a new node: everybody may migrate there (BProc's default)."""


@dataclass(eq=False, slots=True)
class Node:
    """One node; read by everybody, changed by the `NodeTable` alone."""

    number: NodeId
    state: NodeState = NodeState.DOWN
    reason: str = "has not been seen yet"  # a sentence, empty when up
    uid: int = 0
    gid: int = 0
    mode: int = DEFAULT_MODE
    address: str = ""  # where its engine workers listen and connect from; empty until first seen
    since: float = field(default_factory=time.time)  # when the state changed, seconds since the epoch
    heard_last: float = 0.0  # when the last session heard of it for the last time, seconds since the epoch; 0: never
    sample: Sample | None = None  # the last figures, kept when the node goes down
    barred: bool = False  # the administrator wants it down
    reserved: bool = False  # the administrator wants it unavailable whenever it is there
    real: bool = False  # its machine may be rebooted
    notes: dict[str, bytes] = field(default_factory=dict)  # extended attributes, by name
    init: int = 0  # HostPid of its job space's init, as the workers there see it
    session: Session | None = None  # the conversation with its slave, as long as there is one
    runs_on: bool = False  # lost, with jobs that may run to their end there all the same (`onlost continue`)
    doubtful: bool = False  # jobs of the last incarnation may still run, nobody knows: wait for `wait_fenced`
    kept: frozenset[int] = frozenset()  # pids of the jobs with which its slave came back; since then all is as ever
    heard_reports: int = -1  # number of the last report of the last link; -1: its slave is not to come back with jobs
    _fenced: trio.Event = field(default_factory=trio.Event)

    @property
    def link(self) -> Link | None:
        """The link to its slave, or None."""
        return self.session.link if self.session is not None else None

    @property
    def heard(self) -> float:
        """When it was last heard of, seconds since the epoch; 0 where it never was."""
        return self.session.heard if self.session is not None else self.heard_last

    @property
    def holds_jobs(self) -> bool:
        """Whether processes may live there: also, root's only, in the final stage of its start."""
        return self.state.holds_jobs or (self.state is NodeState.BOOT and self.init != 0)

    def live_session(self) -> Session:
        """The session of a node that takes requests.

        Raises:
            BpfsError: EHOSTDOWN with the reason.
        """
        if self.session is None or not self.state.linked:
            raise BpfsError(EHOSTDOWN, f"node {self.number} is {self.state.value}: {self.reason}".rstrip(": "))
        return self.session

    async def wait_fenced(self) -> None:
        """Wait until no job of the last incarnation can be alive, or its slave is back with them (`kept`)."""
        while self.doubtful:
            await self._fenced.wait()


Listener = Callable[[Node, str], None]
"""Called with the node and what changed: added, state, reason, owner, group, mode, address, sample, fenced."""


class NodeTable:
    """All nodes, by number; -1 is the master."""

    def __init__(self, events: EventLog, limit: int = 1024) -> None:
        """Args:
        events: where changes are posted.
        limit: how many nodes there may be.
        """
        self.events = events
        self.limit = limit
        self._nodes: dict[int, Node] = {}
        self._listeners: list[Listener] = []
        self.version = 0
        """Counts every change, those without an event (samples) included."""

    def __iter__(self) -> Iterator[Node]:
        """The nodes in order of number, without the master."""
        return iter([self._nodes[number] for number in sorted(self._nodes) if number >= 0])

    def __len__(self) -> int:
        return len(self._nodes) - (MASTER in self._nodes)

    def __contains__(self, number: int) -> bool:
        return number in self._nodes

    @property
    def numbers(self) -> list[int]:
        """All numbers in order, -1 first where the master is in."""
        return sorted(self._nodes)

    def get(self, number: int) -> Node:
        """The node with this number (-1: master).

        Raises:
            BpfsError: ENOENT.
        """
        node = self._nodes.get(number)
        if node is None:
            raise BpfsError(ENOENT, f"there is no node {number}")
        return node

    def find(self, number: int) -> Node | None:
        """The node with this number, or None."""
        return self._nodes.get(number)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Have a plain function called at every change; the returned function ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def add(self, number: int) -> Node:
        """Make a node.

        Raises:
            BpfsError: EEXIST; ENOSPC where the limit is reached.
        """
        if number in self._nodes:
            raise BpfsError(EEXIST, f"there is a node {number} already")
        if not MASTER <= number < self.limit:
            raise BpfsError(ENOSPC, f"node {number} is beyond the limit of {self.limit} nodes")
        node = Node(NodeId(number))
        self._nodes[number] = node
        self._tell(node, "added", f"node {number} added")
        return node

    # -- changes -----------------------------------------------------------------------------------

    def set_state(self, node: Node, state: NodeState, cause: Cause, reason: str = "") -> None:
        """Bring a node into a state.

        Args:
            reason: a sentence; kept empty for `up`.

        Raises:
            BpfsError: EINVAL where the transition table does not have it.
        """
        if state is node.state:
            return
        check(node.number, node.state, state, cause)
        self.enter(node, state, reason)

    def enter(self, node: Node, state: NodeState, reason: str = "") -> None:
        """Set a state without asking the table (for the master's own node and for tests)."""
        node.state = state
        node.reason = "" if state is NodeState.UP else reason
        node.since = time.time()
        self._tell(
            node, "state", f"node {node.number} state {state.value}" + (f" ({node.reason})" if node.reason else "")
        )

    def set_reason(self, node: Node, reason: str) -> None:
        """Give a new reason for the state the node is in."""
        if node.reason != reason and node.state is not NodeState.UP:
            node.reason = reason
            self._tell(node, "reason", f"node {node.number} reason {reason}")

    def set_owner(self, node: Node, uid: int) -> None:
        """Give the node to a user."""
        if node.uid != uid:
            node.uid = uid
            self._tell(node, "owner", f"node {node.number} owner {uid}")

    def set_group(self, node: Node, gid: int) -> None:
        """Give the node to a group."""
        if node.gid != gid:
            node.gid = gid
            self._tell(node, "group", f"node {node.number} group {gid}")

    def set_mode(self, node: Node, mode: int) -> None:
        """Set who may migrate there: the x bits of `mode`.

        Raises:
            BpfsError: EINVAL for bits other than 0111.
        """
        if mode & ~0o111:
            raise BpfsError(EINVAL, f"mode {mode:o} has other bits than the x bits 111")
        if node.mode != mode:
            node.mode = mode
            self._tell(node, "mode", f"node {node.number} mode {mode:03o}")

    def set_address(self, node: Node, address: str) -> None:
        """Record where the node is."""
        if node.address != address:
            node.address = address
            self._tell(node, "address", f"node {node.number} address {address}")

    def set_sample(self, node: Node, sample: Sample) -> None:
        """Record figures; listeners are told, but no event is posted: they come all the time."""
        node.sample = sample
        self._tell(node, "sample", None)

    def set_doubtful(self, node: Node) -> None:
        """The link is gone, and nobody knows whether the node's jobs are."""
        if not node.doubtful:
            node.doubtful, node.kept = True, frozenset()
            node._fenced = trio.Event()

    def set_fenced(self, node: Node) -> None:
        """From now on no job of the node's last incarnation can be alive."""
        node.doubtful, node.kept, node.heard_reports = False, frozenset(), -1
        node._fenced.set()
        self._tell(node, "fenced", f"node {node.number} fenced")

    def set_certain(self, node: Node, kept: Iterable[int]) -> None:
        """The node is back with these of the jobs it had."""
        node.doubtful, node.kept = False, frozenset(kept)
        node._fenced.set()

    def _tell(self, node: Node, what: str, text: str | None) -> None:
        self.version += 1
        for listener in list(self._listeners):
            listener(node, what)
        if text is not None:
            self.events.post(text, node.number)
