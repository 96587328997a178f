"""Network interfaces of a booting node by ioctl (netdevice(7)), and RARP on all of them."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import random
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from boot import rarp
from boot.node.console import say

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8913, 0x8914, 0x8916, 0x891C  # linux/sockios.h
_IFF_UP = 1
_ARPHRD_ETHER = "1"

FIRST_DELAY, LAST_DELAY, GROWTH = 0.25, 4.0, 1.3
"""Seconds between requests: from the first, growing, to the last, each times 0.75 to 1.25 by chance."""

TELL_EVERY = 20.0
"""Seconds between two lines of the console while nobody answers."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What RARP told.

    Attributes:
        interface, mac: on which it was answered.
        address: this node's.
        server: the server's.
    """

    interface: str
    mac: str
    address: str
    server: str


def interfaces() -> list[str]:
    """Names of all Ethernet interfaces."""
    found = []
    for name in sorted(os.listdir("/sys/class/net")):
        try:
            with open(f"/sys/class/net/{name}/type") as file:
                if file.read().strip() == _ARPHRD_ETHER:
                    found.append(name)
        except OSError:
            continue
    return found


def set_up(name: str) -> None:
    """Switch an interface on. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sh22x", name.encode(), 0))
        flags = struct.unpack_from("16sh", request)[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh22x", name.encode(), flags | _IFF_UP))


def configure(name: str, address: str, prefix: int) -> None:
    """Give an interface its address. Raises OSError."""
    mask = ipaddress.ip_network((0, prefix)).netmask
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for code, value in ((_SIOCSIFADDR, socket.inet_aton(address)), (_SIOCSIFNETMASK, mask.packed)):
            fcntl.ioctl(sock, code, struct.pack("16sHH4s16x", name.encode(), socket.AF_INET, 0, value))


def common_prefix(one: str, other: str) -> int:
    """Bits of the smallest network that has both addresses (RARP tells no mask)."""
    different = int(ipaddress.IPv4Address(one)) ^ int(ipaddress.IPv4Address(other))
    return min(30, 32 - different.bit_length())


def find_server() -> Answer:
    """Ask on all interfaces, for ever, until a server answers."""
    names = interfaces()
    if not names:
        raise OSError(19, "no network interface: the image has no driver for this machine's card")
    for name in names:
        set_up(name)
    say(f"RARP on {' '.join(names)}")
    with _sockets(names) as sockets:
        delay, tell = FIRST_DELAY, time.monotonic() + TELL_EVERY
        while True:
            for sock, (_, mac) in sockets.items():
                try:
                    sock.send(rarp.request(mac))
                except OSError:
                    pass  # its link is not up yet
            answer = _wait(sockets, delay * random.uniform(0.75, 1.25))
            if answer is not None:
                return answer
            delay = min(delay * GROWTH, LAST_DELAY)
            if time.monotonic() >= tell:
                tell += TELL_EVERY
                macs = ", ".join(f"{name} {rarp.mac_text(mac)}" for name, mac in sockets.values())
                say(f"no answer to RARP yet; is the master's bpbootd running, and does it know {macs}?")


@contextmanager
def _sockets(names: list[str]) -> Iterator[dict[socket.socket, tuple[str, bytes]]]:
    found = {}
    try:
        for name in names:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(rarp.ETHERTYPE))
            sock.bind((name, rarp.ETHERTYPE))
            found[sock] = (name, sock.getsockname()[4])
        yield found
    finally:
        for sock in found:
            sock.close()


def _wait(sockets: dict[socket.socket, tuple[str, bytes]], seconds: float) -> Answer | None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        for sock in select.select(list(sockets), [], [], left)[0]:
            try:
                packet = rarp.parse(sock.recv(2048))
            except OSError:
                continue
            name, mac = sockets[sock]
            if packet is None or packet.operation is not rarp.Operation.REPLY or packet.target != mac:
                continue
            address, server = (str(ipaddress.IPv4Address(raw)) for raw in (packet.address, packet.sender_address))
            return Answer(name, rarp.mac_text(mac), address, server)
    return None
