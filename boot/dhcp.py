"""DHCP (RFC 2131) as far as a machine needs it that can boot from its network card's ROM only. No I/O.

A ROM says in its vendor class what it is (`PXEClient`, or `HTTPClient` of UEFI) and in option 93 what it can run; iPXE
says `iPXE` in its user class. Nobody else is answered: an installed system that asks is none of ours.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_HEAD = struct.Struct(">BBBBIHH4s4s4s4s16s64s128s")
_COOKIE = bytes([99, 130, 83, 99])
_BOOTREQUEST, _BOOTREPLY, _ETHERNET = 1, 2, 1
_LEAST = 300  # bytes of an answer: some ROMs take nothing shorter (RFC 1542, 2.1)

LEASE = 3600
"""Seconds that an address is good for: a ROM needs it for some of them, and phase 1 asks by RARP anew."""


class Kind(enum.IntEnum):
    """What a message is (option 53)."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    ACK = 5


class Client(enum.Enum):
    """Who asks, by what it can boot."""

    IPXE = "ipxe"  # takes a script by HTTP
    BIOS = "bios"  # takes a boot program by TFTP
    UEFI = "uefi"  # takes an EFI program by TFTP
    UEFI_HTTP = "uefi-http"  # takes an EFI program by HTTP


_ANSWERS = {Kind.DISCOVER: Kind.OFFER, Kind.REQUEST: Kind.ACK}

# Option 93 of x86 machines (RFC 4578, and IANA's list of processor architecture types).
_ARCHITECTURES = {0: Client.BIOS, 7: Client.UEFI, 9: Client.UEFI, 16: Client.UEFI_HTTP}


class _Option(enum.IntEnum):  # RFC 2132, 3004, 4578
    MASK = 1
    ADDRESS = 50
    LEASE = 51
    KIND = 53
    SERVER = 54
    VENDOR = 60
    BOOT_FILE = 67
    USER_CLASS = 77
    ARCHITECTURE = 93


@dataclass(frozen=True, slots=True)
class Packet:
    """A request that deserves a look.

    Attributes:
        xid, flags, client_address: to be given back.
        mac: 6 bytes.
        server: the server that the client has chosen, 4 bytes; empty while it has not.
        wanted: the address that it believes to have, 4 bytes or empty.
    """

    kind: Kind
    client: Client
    mac: bytes
    xid: int
    flags: int
    client_address: bytes
    server: bytes
    wanted: bytes


def parse(data: bytes) -> Packet | None:
    """What a datagram asks for; None where it is nothing that is answered here."""
    if len(data) < _HEAD.size + len(_COOKIE) or data[_HEAD.size : _HEAD.size + 4] != _COOKIE:
        return None
    operation, kind, size, _, xid, _, flags, client_address, *_, hardware, _, _ = _HEAD.unpack_from(data)
    mac = hardware[:6]
    if (operation, kind, size) != (_BOOTREQUEST, _ETHERNET, 6) or mac[0] & 1 or not any(mac):
        return None
    options = dict(_options(data[_HEAD.size + 4 :]))
    client = _client(options)
    asked = options.get(_Option.KIND, b"")
    if client is None or asked not in (bytes([Kind.DISCOVER]), bytes([Kind.REQUEST])):
        return None
    server, wanted = (options.get(it, b"") for it in (_Option.SERVER, _Option.ADDRESS))
    if any(len(it) not in (0, 4) for it in (server, wanted)):
        return None
    return Packet(Kind(asked[0]), client, mac, xid, flags, client_address, server, wanted)


def _options(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place < len(data) and data[place] != 255:
        if data[place] == 0:
            place += 1
            continue
        if place + 2 > len(data) or place + 2 + data[place + 1] > len(data):
            return
        size = data[place + 1]
        yield data[place], data[place + 2 : place + 2 + size]
        place += 2 + size


def _client(options: dict[int, bytes]) -> Client | None:
    vendor, kind = options.get(_Option.VENDOR, b""), options.get(_Option.ARCHITECTURE, b"")
    client = _ARCHITECTURES.get(int.from_bytes(kind[:2], "big")) if len(kind) >= 2 else Client.BIOS
    if not vendor.startswith((b"PXEClient", b"HTTPClient")) or client is None:
        return None
    return Client.IPXE if b"iPXE" in options.get(_Option.USER_CLASS, b"") else client


def reply(packet: Packet, server: bytes, address: bytes, mask: bytes, file: str) -> bytes:
    """The answer to a request.

    Args:
        server, address, mask: 4 bytes each; `address` is the client's.
        file: what it is to boot: a name for TFTP or an address of HTTP, ASCII.
    """
    name = file.encode("ascii")
    options = [
        (_Option.KIND, bytes([_ANSWERS[packet.kind]])), (_Option.SERVER, server), (_Option.MASK, mask),
        (_Option.LEASE, LEASE.to_bytes(4, "big")), (_Option.BOOT_FILE, name),
    ]  # fmt: skip
    if packet.client is Client.UEFI_HTTP:
        options.append((_Option.VENDOR, b"HTTPClient"))  # without which it takes the answer for another's
    head = _HEAD.pack(
        _BOOTREPLY, _ETHERNET, 6, 0, packet.xid, 0, packet.flags, packet.client_address, address, server, bytes(4),
        packet.mac.ljust(16, b"\0"), b"", name if len(name) < 128 else b"",
    )  # fmt: skip
    return (head + _COOKIE + _packed(options)).ljust(_LEAST, b"\0")


def _packed(options: Iterable[tuple[int, bytes]]) -> bytes:
    return b"".join(bytes([code, len(value)]) + value for code, value in options) + b"\xff"
