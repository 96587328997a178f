"""RARP frames (RFC 903): "this is my hardware address, which is my network address?", and the answer.

No I/O: both the nodes and the server use it, and it can be fuzzed.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

ETHERTYPE = 0x8035
BROADCAST = bytes([255] * 6)
ANY = bytes(4)

_FRAME = struct.Struct(">6s6sHHHBBH6s4s6s4s")


class Operation(enum.IntEnum):
    """The two kinds of frames."""

    REQUEST = 3
    REPLY = 4


@dataclass(frozen=True, slots=True)
class Packet:
    """One frame.

    Attributes:
        target: whose address it is about.
        address: 4 bytes, the target's network address; zeros in a request.
        sender, sender_address: of whom it comes; in a reply the server.
    """

    operation: Operation
    sender: bytes
    sender_address: bytes
    target: bytes
    address: bytes


def request(mac: bytes) -> bytes:
    """The frame that asks for one's own address."""
    return _FRAME.pack(
        BROADCAST, mac, ETHERTYPE, 1, 0x0800, 6, 4, Operation.REQUEST, mac, ANY, mac, ANY
    )  # fmt: skip


def reply(server: bytes, server_address: bytes, mac: bytes, address: bytes) -> bytes:
    """The frame that answers it."""
    return _FRAME.pack(mac, server, ETHERTYPE, 1, 0x0800, 6, 4, Operation.REPLY, server, server_address, mac, address)


def parse(frame: bytes) -> Packet | None:
    """What a frame says; None where it is no sound RARP frame of Ethernet and IPv4."""
    if len(frame) < _FRAME.size:
        return None
    _, _, kind, *head, operation, sender, sender_address, target, address = _FRAME.unpack_from(frame)
    if kind != ETHERTYPE or head != [1, 0x0800, 6, 4] or operation not in (Operation.REQUEST, Operation.REPLY):
        return None
    if target[0] & 1 or not any(target):  # a group's, or nobody's
        return None
    return Packet(Operation(operation), sender, sender_address, target, address)


def mac_text(mac: bytes) -> str:
    """As people write it: 52:54:00:00:00:01."""
    return mac.hex(":")


def mac_bytes(text: str) -> bytes:
    """The inverse. Raises ValueError."""
    mac = bytes.fromhex(text.replace(":", ""))
    if len(mac) != 6:
        raise ValueError(f"{text!r} is no hardware address")
    return mac
