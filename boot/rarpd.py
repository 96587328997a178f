"""The RARP server of one interface."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

from boot import rarp
from boot.answers import Answerer
from boot.directory import Directory
from boot.reports import Reporter


class RarpServer(Answerer):
    """Answers who is known; frames that are none, or of others, cost a look and nothing else."""

    def __init__(self, interface: str, address: str, directory: Callable[[], Directory], reporter: Reporter) -> None:
        """Args:
        address: what nodes are told to be the server's.

        Raises:
            OSError: there is no such interface, or no right to.
        """
        self._directory = directory
        self._reporter = reporter
        self._address = ipaddress.IPv4Address(address).packed
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        super().__init__(sock)
        # Bound to protocol and interface at once, so that not one frame of others comes in.
        sock.bind((interface, rarp.ETHERTYPE))
        self._mac: bytes = sock.getsockname()[4]

    def answer(self, data: bytes) -> bytes | None:
        """The answer to a frame, where it deserves one."""
        packet = rarp.parse(data)
        if packet is None or packet.operation is not rarp.Operation.REQUEST:
            return None
        mac, directory = rarp.mac_text(packet.target), self._directory()
        found = directory.found(mac, self._reporter)
        if found is None:
            return None
        address = found[1]
        return rarp.reply(self._mac, self._address, packet.target, ipaddress.IPv4Address(address).packed)
