"""The RARP server of one interface."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable

from boot import rarp
from boot.directory import Directory
from boot.reports import Reporter

_PER_TURN = 64
"""Frames that are looked at before the rest of the server has its turn again."""


class RarpServer:
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
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        # Bound to protocol and interface at once, so that not one frame of others comes in.
        self._socket.bind((interface, rarp.ETHERTYPE))
        self._mac: bytes = self._socket.getsockname()[4]

    def start(self) -> None:
        """Serve from now on, in the running event loop."""
        asyncio.get_running_loop().add_reader(self._socket, self._turn)

    def close(self) -> None:
        """Serve no more."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def _turn(self) -> None:
        for _ in range(_PER_TURN):
            try:
                frame = self._socket.recv(2048)
            except OSError:  # nothing left; or the interface is down, and is waited for
                return
            answer = self.answer(frame)
            if answer is not None:
                try:
                    self._socket.send(answer)
                except OSError:
                    return  # the node asks again

    def answer(self, frame: bytes) -> bytes | None:
        """The answer to a frame, where it deserves one."""
        packet = rarp.parse(frame)
        if packet is None or packet.operation is not rarp.Operation.REQUEST:
            return None
        mac, directory = rarp.mac_text(packet.target), self._directory()
        found = directory.found(mac, self._reporter)
        if found is None:
            return None
        address = found[1]
        return rarp.reply(self._mac, self._address, packet.target, ipaddress.IPv4Address(address).packed)
