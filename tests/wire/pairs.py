"""Pairs of connected sockets and links for tests."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager

import trio

from bpfs.wire.link import Link


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a real TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    return near, far


@asynccontextmanager
async def links(near_handlers, far_handlers):
    """Two links that talk to each other; both run until the context ends."""
    near, far = (Link(sock, name) for sock, name in zip(tcp_pair(), ("far", "near"), strict=True))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.run, near_handlers)
        nursery.start_soon(far.run, far_handlers)
        try:
            yield near, far
        finally:
            near.close("test over")
            far.close("test over")
