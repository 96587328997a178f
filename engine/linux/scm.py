"""SCM_RIGHTS (unix(7)) between the worker and a process it builds or turns into a ghost."""

import array
import socket
import struct
from typing import Final

MAX_FDS: Final = 250  # SCM_MAX_FD is 253


def send_fds(sock: socket.socket, fds: list[int]) -> int:
    """Send descriptors, in packets of at most MAX_FDS; returns the number of packets."""
    packets = 0
    for first in range(0, len(fds), MAX_FDS):
        part = array.array("i", fds[first : first + MAX_FDS])
        sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, part)])
        packets += 1
    return packets


RECEIVE_SIZE: Final = 96 + 1024  # msghdr, iovec and data byte, control


def receive_block(address: int) -> bytes:
    """A struct msghdr with its buffers, to be placed at `address` of a process that calls recvmsg on it."""
    iov, byte, control = address + 64, address + 80, address + 96
    header = struct.pack("=QIIQQQQiI", 0, 0, 0, iov, 1, control, 1024, 0, 0)
    return header.ljust(64, b"\0") + struct.pack("=QQ", byte, 1)


CONTROL_OFFSET: Final = 96


def received_fds(control: bytes) -> list[int]:
    """The descriptor numbers in a control buffer that recvmsg filled."""
    length, level, kind = struct.unpack_from("=Qii", control)
    if level != socket.SOL_SOCKET or kind != socket.SCM_RIGHTS or not 16 < length <= len(control):
        raise OSError(71, "no descriptors in the message")
    return list(struct.unpack_from(f"={(length - 16) // 4}i", control, 16))
