"""unix(7) SEQPACKET: one msgpack map a packet, with descriptors beside it."""

import array
import os
import socket
from typing import Any, Final

import msgpack

MAX_PACKET: Final = 200_000
_MAX_FDS: Final = 250
_NAMES: Final = "surrogateescape"  # of files, in sentences, may be no UTF-8
_ANCILLARY: Final = socket.CMSG_SPACE(_MAX_FDS * 4)


def send(sock: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
    """Send one map. Raises OSError (EPIPE: the peer is gone; EMSGSIZE)."""
    body = msgpack.packb(message, unicode_errors=_NAMES)
    if len(body) > MAX_PACKET:
        raise OSError(90, f"a message of {len(body)} bytes is too long")
    if fds:
        sock.sendmsg([body], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))], socket.MSG_NOSIGNAL)
    else:
        sock.send(body, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Receive one map and its descriptors (close-on-exec); None at the end of the stream.

    Raises:
        OSError: EBADMSG, it is no map; the descriptors are closed then.
    """
    body, ancillary, flags, _ = sock.recvmsg(MAX_PACKET, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % 4])
    if not body:
        return None
    try:
        message = msgpack.unpackb(body, strict_map_key=False, unicode_errors=_NAMES)
        if not isinstance(message, dict) or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("not a whole map")
    except Exception as error:
        for fd in fds:
            os.close(fd)
        raise OSError(74, f"bad packet: {error}") from error
    return message, list(fds)


def next_operation(sock: socket.socket) -> str:
    """The `op` of the map that waits to be received, which stays there; empty at the end of the stream."""
    try:
        body = sock.recv(MAX_PACKET, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return str(msgpack.unpackb(body, strict_map_key=False)["op"]) if body else ""
    except (OSError, ValueError, KeyError, TypeError, msgpack.UnpackException):
        return ""
