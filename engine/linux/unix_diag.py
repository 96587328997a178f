"""sock_diag(7), <linux/unix_diag.h>: who is at the other end of a Unix socket."""

import os
import socket
import struct
from dataclasses import dataclass
from typing import Final

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_NLMSG_ERROR: Final = 2
_SHOW_NAME: Final = 1
_SHOW_PEER: Final = 4
_ATTR_NAME: Final = 0
_ATTR_PEER: Final = 2
_ATTR_SHUTDOWN: Final = 6
_REQUEST: Final = struct.Struct("=BBHIIIII")
_HEADER: Final = struct.Struct("=IHHII")


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """`peer`: inode of the other end, 0 when there is none (any more); `shutdown`: 1 receiving, 2 sending has ended."""

    peer: int
    shutdown: int
    named: bool


class UnixDiag:
    """Asks about Unix sockets of the caller's network namespace by inode."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)

    def close(self) -> None:
        """Close the netlink socket."""
        self._socket.close()

    def get(self, inode: int) -> UnixSocket:
        """Look one socket up. Raises OSError (ENOENT: not of this namespace; or a kernel without CONFIG_UNIX_DIAG)."""
        anyone = 0xFFFFFFFF
        body = _REQUEST.pack(socket.AF_UNIX, 0, 0, anyone, inode, _SHOW_PEER | _SHOW_NAME, anyone, anyone)
        self._socket.send(_HEADER.pack(16 + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body)
        answer = self._socket.recv(8192)
        length, kind = struct.unpack_from("=IH", answer)
        if kind == _NLMSG_ERROR:
            code = -struct.unpack_from("=i", answer, 16)[0]
            raise OSError(code, os.strerror(code), f"unix socket {inode}")
        return _parse(answer[32:length])


def _parse(attributes: bytes) -> UnixSocket:
    peer = shutdown = at = 0
    named = False
    while at + 4 <= len(attributes):
        size, kind = struct.unpack_from("=HH", attributes, at)
        if kind == _ATTR_PEER:
            peer = struct.unpack_from("=I", attributes, at + 4)[0]
        elif kind == _ATTR_SHUTDOWN:
            shutdown = attributes[at + 4]
        elif kind == _ATTR_NAME:
            named = size > 4
        at += max(4, size + 3 & ~3)
    return UnixSocket(peer, shutdown, named)
