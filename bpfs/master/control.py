"""The master's control socket: how bpcluster asks without going through the tree (which may not be mounted, or
hang).

One line in, lines out, end. Only root gets at the socket.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

import trio

from bpfs.master.cluster import Cluster
from bpfs.nodes.registry import Node

TIMEOUT = 10.0
"""Seconds that a client may take for its line."""


def _line(node: Node) -> str:
    access = f"{node.mode:03o} {node.uid} {node.gid}"
    return f"{node.number} {node.state.value} {access} {node.address or '-'} {node.reason}".rstrip()


def status_text(cluster: Cluster) -> str:
    """A line a node: number, state, mode, uid, gid, address, reason."""
    return "".join(_line(node) + "\n" for node in cluster.nodes)


async def serve(cluster: Cluster, path: Path, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve the socket for ever; started when it is there."""
    _remove(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    with sock:
        # A path in /run/bpfs may be longer than the 107 bytes of an address: go by the directory's descriptor.
        folder = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
        try:
            sock.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)
        sock.listen(16)
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.lowlevel.wait_readable(sock)
                    with suppress(BlockingIOError):
                        conn, _ = sock.accept()
                        stream = trio.SocketStream(trio.socket.from_stdlib_socket(conn))
                        nursery.start_soon(_answer, cluster, stream, name="control")
        finally:
            _remove(path)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()


async def _answer(cluster: Cluster, stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async with stream:
            with trio.move_on_after(TIMEOUT):
                line = await stream.receive_some(256)
                if line.strip() == b"status":
                    await stream.send_all(status_text(cluster).encode())
