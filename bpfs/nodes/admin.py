"""What the administrator does to a node: the writes to `nodes/N/state`, one function a state."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from errno import EHOSTDOWN, EINVAL, EIO

import trio

from bpfs.errors import BpfsError
from bpfs.nodes.admission import BARRED, Admission
from bpfs.nodes.power import Power
from bpfs.nodes.registry import MASTER, Node, NodeTable
from bpfs.nodes.session import RESERVED
from bpfs.nodes.stage import Stage
from bpfs.nodes.states import Cause, NodeState, check

UP_TIMEOUT = 15.0
"""Seconds that a node may take to come up after `up`: its slave waits at the gate, and makes its job space in a
moment."""


_SWITCHED = {NodeState.REBOOT: "cycle", NodeState.PWROFF: "off"}
"""What the power command is told where there is no slave to tell: a machine that hangs."""


class Administrator:
    """Carries out what is written to the state files; a call returns when the thing is done."""

    def __init__(self, table: NodeTable, admission: Admission, stage: Stage, power: Power) -> None:
        self._table = table
        self._power = power
        self._stage = stage
        self._admission = admission
        self._wishes: dict[NodeState, Callable[[Node], Awaitable[None]]] = {
            NodeState.DOWN: self._down,
            NodeState.UP: self._up,
            NodeState.UNAVAILABLE: self._unavailable,
            NodeState.ERROR: self._error,
            NodeState.REBOOT: self._reboot,
            NodeState.HALT: self._halt,
            NodeState.PWROFF: self._pwroff,
        }

    async def set_state(self, node: Node, wanted: NodeState) -> None:
        """Bring a node into the wanted state.

        Raises:
            BpfsError: EINVAL where that cannot be wished; EHOSTDOWN where there is no slave to be up; EIO where it
            fails.
        """
        if node.number == MASTER:
            raise BpfsError(EINVAL, "the master's state cannot be set")
        wish = self._wishes.get(wanted)
        if wish is None:
            raise BpfsError(EINVAL, f"node {node.number} cannot be set to {wanted.value}: it goes there by itself")
        await wish(node)

    async def _down(self, node: Node) -> None:
        if node.state.holds_jobs:
            await self._stage.down(node)
        node.barred = True
        if node.state is NodeState.DOWN:
            self._table.set_reason(node, BARRED)
        else:
            self._table.set_state(node, NodeState.DOWN, Cause.ADMIN, BARRED)
        if node.session is not None:
            await node.session.fence(BARRED, "afresh")
        await node.wait_fenced()

    async def _up(self, node: Node) -> None:
        node.reserved = False
        if node.state is NodeState.DOWN and not node.barred:
            await self._power.on(node)
            return
        if node.state is NodeState.ERROR:
            session = node.live_session()
            if node.init == 0:  # it cannot hold jobs
                await session.fence("its slave starts afresh", "afresh")
            else:
                self._table.set_state(node, NodeState.BOOT, Cause.ADMIN, "its start is finished once more")
                await session.finish()
        elif node.state is NodeState.UNAVAILABLE:
            self._table.set_state(node, NodeState.UP, Cause.ADMIN)
        if node.state is NodeState.UP:
            return
        if node.barred:
            node.barred = False
            self._table.set_reason(node, "waits for its slave")
            self._admission.unbar(node.number)
        try:
            await self._wait_up(node)
        except BpfsError:
            # No slave waited at the gate: its machine is off.
            if node.state is not NodeState.DOWN or not self._power.knows(node):
                raise
            await self._power.on(node)

    async def _wait_up(self, node: Node) -> None:
        with trio.move_on_after(UP_TIMEOUT):
            while node.state in (NodeState.DOWN, NodeState.BOOT) and not node.barred:
                await self._table.events.wait_change()
        if node.state is NodeState.ERROR:
            raise BpfsError(EIO, f"node {node.number} is in error: {node.reason}")
        if node.state is not NodeState.UP:
            raise BpfsError(EHOSTDOWN, f"node {node.number} has not come up: it is {node.state.value}, {node.reason}")

    async def _unavailable(self, node: Node) -> None:
        check(node.number, node.state, NodeState.UNAVAILABLE, Cause.ADMIN)
        node.reserved = True
        self._table.set_state(node, NodeState.UNAVAILABLE, Cause.ADMIN, RESERVED)

    async def _error(self, node: Node) -> None:
        self._table.set_state(node, NodeState.ERROR, Cause.ADMIN, "error by the administrator")

    async def _reboot(self, node: Node) -> None:
        await self._end(node, NodeState.REBOOT, "rebooted by the administrator")

    async def _halt(self, node: Node) -> None:
        await self._end(node, NodeState.HALT, "halted by the administrator")

    async def _pwroff(self, node: Node) -> None:
        await self._end(node, NodeState.PWROFF, "powered off by the administrator")

    async def _end(self, node: Node, state: NodeState, reason: str) -> None:
        if node.session is None and state in _SWITCHED and self._power.has_command:
            await self._power.command(node, _SWITCHED[state])
            return
        if node.session is None:
            node.live_session()  # says that it is down, and why
        check(node.number, node.state, state, Cause.ADMIN)
        session = node.live_session()
        if node.state.holds_jobs:
            await self._stage.down(node)
            check(node.number, node.state, state, Cause.ADMIN)
        self._table.set_state(node, state, Cause.ADMIN, reason)
        await session.fence(reason, state.value)
        await node.wait_fenced()
