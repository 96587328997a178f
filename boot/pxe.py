"""Answers for machines whose firmware boots from the network card only: DHCP and TFTP, on one named interface.

A ROM gets its node's address and the name of iPXE, by TFTP (UEFI may take it by HTTP); iPXE asks again, and gets the
address of a script that loads phase 1 by HTTP. Nothing else is served, and nobody is answered who is no node.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from boot import dhcp, rarp
from boot.answers import Answerer
from boot.dhcp import Client, Kind
from boot.directory import Directory
from boot.reports import Report, Reporter

BIOS_LOADER, UEFI_LOADER, SCRIPT = "undionly.kpxe", "ipxe.efi", "phase1.ipxe"
LOADERS = (BIOS_LOADER, UEFI_LOADER)
"""Of Debian's package ipxe; `bpboot image 1 --pxe` puts them beside phase 1."""

DHCP_PORT, CLIENT_PORT, TFTP_PORT = 67, 68, 69

TRANSFERS_MOST = 128
"""TFTP transfers at once; who comes when there are more asks again."""
_BLOCK_LEAST, _BLOCK_USUAL, _BLOCK_MOST = 8, 512, 1428
_RESEND, _PATIENCE = 1.0, 5  # seconds until a block is sent again, and how often

_log = logging.getLogger("boot")


def script(port: int, command_line: str) -> str:
    """What iPXE is told: phase 1 from where the script came from."""
    return (
        "#!ipxe\n"
        f"set base http://${{next-server}}:{port}\n"
        f"kernel ${{base}}/phase1.vmlinuz initrd=phase1.img {command_line}\n"
        "initrd ${base}/phase1.img\n"
        "boot\n"
    )


def bound(interface: str, address: str, port: int) -> socket.socket:
    """A UDP socket that hears one interface, and sends there only. Raises OSError."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock


class DhcpServer(Answerer):
    """Tells the ROM of a node its address and what to boot."""

    def __init__(
        self, interface: str, network: ipaddress.IPv4Interface, port: int, directory: Callable[[], Directory],
        reporter: Reporter,
    ) -> None:  # fmt: skip
        """Args:
        port: of HTTP.

        Raises:
            OSError: somebody else answers DHCP on this machine.
        """
        self._directory = directory
        self._reporter = reporter
        self._address, self._mask = network.ip.packed, network.netmask.packed
        url = f"http://{network.ip}:{port}"
        self._files = {
            Client.IPXE: f"{url}/{SCRIPT}",
            Client.BIOS: BIOS_LOADER,
            Client.UEFI: UEFI_LOADER,
            Client.UEFI_HTTP: f"{url}/{UEFI_LOADER}",
        }
        super().__init__(bound(interface, "", DHCP_PORT))

    def _send(self, data: bytes) -> None:
        # By broadcast, as it has no address yet that it could be asked for by ARP.
        self._socket.sendto(data, ("255.255.255.255", CLIENT_PORT))

    def answer(self, data: bytes) -> bytes | None:
        """The answer to a datagram, where it deserves one."""
        packet = dhcp.parse(data)
        if packet is None or packet.server not in (b"", self._address):
            return None
        found = self._directory().found(rarp.mac_text(packet.mac), self._reporter)
        if found is None:
            return None
        number, address = found
        own = ipaddress.IPv4Address(address).packed
        if packet.kind is Kind.REQUEST and packet.wanted not in (b"", own):
            return None  # another's address: it starts over
        file = self._files[packet.client]
        self._reporter.tell(Report.LOG, number, f"its {packet.client.value} gets {file}")
        return dhcp.reply(packet, self._address, own, self._mask, file)


class TftpServer(asyncio.DatagramProtocol):
    """Hands the boot programs to nodes (RFC 1350, 2348, 2349); it reads names from a table, and writes nothing."""

    def __init__(self, interface: str, address: str, folder: Path, directory: Callable[[], Directory]) -> None:
        self._interface = interface
        self._address = address
        self._folder = folder
        self._directory = directory
        self._transfers: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._transport: asyncio.BaseTransport | None = None

    async def start(self) -> None:
        """Serve from now on. Raises OSError."""
        sock = bound(self._interface, self._address, TFTP_PORT)
        self._transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=sock)

    def close(self) -> None:
        """Serve no more."""
        if self._transport is not None:
            self._transport.close()
        for task in self._transfers.values():
            task.cancel()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """A request: anything else, and anybody else's, is nothing."""
        request = parse_request(data)
        if request is None or addr in self._transfers or len(self._transfers) >= TRANSFERS_MOST:
            return
        if request[0] not in LOADERS or self._directory().by_address(addr[0]) is None:
            return
        task = asyncio.get_running_loop().create_task(self._transfer(addr, *request))
        self._transfers[addr] = task
        task.add_done_callback(lambda _: self._transfers.pop(addr, None))

    async def _transfer(self, addr: tuple[str, int], name: str, options: dict[str, int]) -> None:
        try:
            content = (self._folder / name).read_bytes()
        except OSError as error:
            _log.error("%s asks for %s: %s (bpboot image 1 --pxe makes it)", addr[0], name, error.strerror)
            return
        with bound(self._interface, self._address, 0) as sock:
            sock.connect(addr)
            try:
                size = options.get("blksize", _BLOCK_USUAL)
                if options:
                    told = {"blksize": size, "tsize": len(content)}
                    text = b"".join(f"{key}\0{told[key]}\0".encode() for key in options)
                    await _send(sock, struct.pack(">H", 6) + text, 0)
                for block in range(len(content) // size + 1):  # the last is short, or empty
                    data = content[block * size : (block + 1) * size]
                    await _send(sock, struct.pack(">HH", 3, (block + 1) & 0xFFFF) + data, (block + 1) & 0xFFFF)
            except (OSError, TimeoutError):
                pass  # it went away


async def _send(sock: socket.socket, data: bytes, block: int) -> None:
    """A packet, until it is acknowledged. Raises TimeoutError; ConnectionError where the other end has had enough."""
    loop = asyncio.get_running_loop()
    for _ in range(_PATIENCE):
        await loop.sock_sendall(sock, data)
        try:
            async with asyncio.timeout(_RESEND):
                while (answer := await loop.sock_recv(sock, 1024))[:4] != struct.pack(">HH", 4, block):
                    if answer[:2] == b"\0\5":
                        raise ConnectionError("the client ends the transfer")
            return
        except TimeoutError:
            continue
    raise TimeoutError("no acknowledgement")


def parse_request(data: bytes) -> tuple[str, dict[str, int]] | None:
    """Name and options of a request to read; None where it is none."""
    if data[:2] != b"\0\1" or not data.endswith(b"\0"):
        return None
    words = data[2:-1].decode("latin-1").split("\0")
    if len(words) < 2 or words[1].lower() != "octet":
        return None
    options: dict[str, int] = {}
    for key, value in zip(words[2::2], words[3::2], strict=False):
        if key.lower() == "tsize":
            options["tsize"] = 0
        if key.lower() == "blksize" and value.isascii() and value.isdigit() and int(value[:9]) >= _BLOCK_LEAST:
            options["blksize"] = min(int(value[:9]), _BLOCK_MOST)
    return words[0].lstrip("/"), options
