"""A server of datagrams in the event loop: each that comes in has one answer, or none."""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod

_PER_TURN = 64
"""Datagrams that are looked at before the rest of the server has its turn again."""
_SIZE = 2048


class Answerer(ABC):
    """Reads a socket that does not block, and closes it in the end."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def start(self) -> None:
        """Serve from now on, in the running event loop."""
        asyncio.get_running_loop().add_reader(self._socket, self._turn)

    def close(self) -> None:
        """Serve no more."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    @abstractmethod
    def answer(self, data: bytes) -> bytes | None:
        """The answer to a datagram, where it deserves one."""

    def _send(self, data: bytes) -> None:
        self._socket.send(data)

    def _turn(self) -> None:
        for _ in range(_PER_TURN):
            try:
                answer = self.answer(self._socket.recv(_SIZE))
                if answer is not None:
                    self._send(answer)
            except OSError:  # nothing left; or the interface is down, and who asked does so again
                return
