"""Starting machines that are off: by the administrator's own command, for a management controller or a switched
socket, or by Wake-on-LAN.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from errno import EHOSTDOWN, EIO

import trio

from bpfs import log
from bpfs.config import WOL, Config
from bpfs.errors import BpfsError
from bpfs.nodes.admission import Admission
from bpfs.nodes.registry import Node, NodeTable
from bpfs.nodes.stage import Step
from bpfs.nodes.states import Cause, NodeState

_log = log.get("nodes")

COMMAND_TIMEOUT = 60.0
"""Seconds that the command may take: a management controller answers within ten."""

START_TIMEOUT = 300.0
"""Seconds from power-on to the first sign of life: large servers test their memory for minutes."""

PORT = 9  # discard: where Wake-on-LAN is sent by custom
STARTED = "its machine was told to start"


def magic(mac: str) -> bytes:
    """The packet that wakes the machine with this hardware address."""
    return b"\xff" * 6 + bytes.fromhex(mac.replace(":", "")) * 16


class Power:
    """What can be done to a machine that has no slave."""

    def __init__(
        self, nodes: NodeTable, admission: Admission, config: Callable[[], Config],
        run: Callable[[Node, Step, float], Awaitable[None]], nursery: trio.Nursery,
    ) -> None:  # fmt: skip
        """Args:
        run: runs a command, with its output in the node's log; raises BpfsError where it fails.
        nursery: for what waits for machines that were told to start.
        """
        self._nodes = nodes
        self._admission = admission
        self._config = config
        self._run = run
        self._nursery = nursery

    @property
    def has_command(self) -> bool:
        """Whether machines can be switched off, too."""
        return self._config().powercontrol not in ((), WOL)

    def knows(self, node: Node) -> bool:
        """Whether there is a way to start this node's machine."""
        config = self._config()
        if config.powercontrol == WOL:
            return bool(config.interface and self._macs(node))
        return bool(config.powercontrol)

    async def on(self, node: Node) -> None:
        """Start the machine; returns when it was told to.

        Raises:
            BpfsError: EHOSTDOWN: there is no way to; EIO: the command failed.
        """
        if not self.knows(node):
            raise BpfsError(EHOSTDOWN, f"node {node.number} is not connected: {node.reason}")
        if self._config().powercontrol == WOL:
            self._wake(node)
        else:
            await self.command(node, "on")
        if node.state is NodeState.DOWN and node.session is None:  # it may have come meanwhile
            self._nodes.set_state(node, NodeState.BOOT, Cause.BOOTING, STARTED)
            self._nursery.start_soon(self._expect, node, node.since, name=f"start of node {node.number}")

    async def command(self, node: Node, verb: str) -> None:
        """Run the administrator's command: on, off or cycle.

        Raises:
            BpfsError: EIO: it failed, its last line being the sentence.
        """
        words = [*self._config().powercontrol, verb, str(node.number)]
        step = Step("powercontrol", words, {"MACS": " ".join(self._macs(node))})
        await self._run(node, step, COMMAND_TIMEOUT)

    def _macs(self, node: Node) -> tuple[str, ...]:
        configured = next((entry.macs for entry in self._config().entries if entry.number == node.number), ())
        return configured or tuple(mac for mac in self._admission.known(node.number)[1] if mac)

    def _wake(self, node: Node) -> None:
        interface = self._config().interface
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                for mac in self._macs(node):
                    sock.sendto(magic(mac), ("255.255.255.255", PORT))
        except OSError as error:
            raise BpfsError(EIO, f"Wake-on-LAN on {interface}: {error.strerror}") from None
        _log.info("node %d: Wake-on-LAN to %s", node.number, " ".join(self._macs(node)))

    async def _expect(self, node: Node, since: float) -> None:
        await trio.sleep(START_TIMEOUT)
        if node.state is NodeState.BOOT and node.since == since and node.reason == STARTED:
            text = f"{STARTED}, and has asked for no address within {START_TIMEOUT:g} s"
            self._nodes.set_state(node, NodeState.DOWN, Cause.LOST, text)
