"""The boot server: RARP, HTTP, and for ROMs DHCP and TFTP, on one named interface, in one event loop."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from boot.directory import Directory
from boot.httpd import HttpServer
from boot.pxe import DhcpServer, TftpServer
from boot.rarpd import RarpServer
from boot.reports import Report, Reporter


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a boot server runs by.

    Attributes:
        interface, address: where it serves, and nowhere else.
        port: of HTTP.
        folder: manifest, kernel and image.
        boot_key: the file of the private key that signs what it says.
        directory: gives the nodes; called again at SIGHUP.
        pxe: the interface's network, where ROMs of network cards are answered, too; None: they are not.
        reports: descriptor for the lines of `boot.reports`; where it is a socket, its end is the server's, too.
    """

    interface: str
    address: str
    port: int
    folder: Path
    boot_key: Path
    directory: Callable[[], Directory]
    reports: int
    pxe: ipaddress.IPv4Interface | None = None


async def serve(options: ServerOptions, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        OSError: it cannot start.
    """
    reporter = Reporter(options.reports)
    current = options.directory()
    http = HttpServer(options.folder, options.boot_key, lambda: current, reporter)
    port = await http.start(options.address, options.port)
    roms: list[DhcpServer | TftpServer] = []
    if options.pxe is not None:
        tftp = TftpServer(options.interface, options.address, options.folder, lambda: current)
        await tftp.start()
        dhcp = DhcpServer(options.interface, options.pxe, port, lambda: current, reporter)
        dhcp.start()
        roms += [dhcp, tftp]
    rarp = RarpServer(options.interface, options.address, lambda: current, reporter)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def again() -> None:
        nonlocal current
        current = options.directory()

    loop.add_signal_handler(signal.SIGHUP, again)
    for signo in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signo, ended.set)
    if stat.S_ISSOCK(os.fstat(options.reports).st_mode):
        loop.add_reader(options.reports, ended.set)  # nobody writes to us: the other end was closed
    rarp.start()
    reporter.tell(Report.READY, options.address, port)
    ready()
    try:
        await ended.wait()
    finally:
        for server in roms:
            server.close()
        rarp.close()
        http.close()
