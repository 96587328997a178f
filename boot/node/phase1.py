"""Phase 1: turns any way of booting into this one: find the server, fetch kernel and image from it, switch to them."""

from __future__ import annotations

import os
from pathlib import Path

from boot import cpio, manifest, modules
from boot.manifest import Blob
from boot.modules import Table
from boot.node import kexec, network
from boot.node.console import say
from boot.node.drivers import Drivers, devices
from boot.node.fetch import Server

KEY = Path("/etc/beowulf/bootkey")
PORT = Path("/etc/beowulf/bootport")

CONF = "etc/beowulf/node.conf"
"""What phase 1 learns of this node and phase 2 wants to know: put behind the image, with the drivers that it needs."""


def run() -> None:
    """Once through all steps; does not return where they work.

    Raises:
        BootError, OSError: with what failed.
    """
    loaded = Drivers().load_for_hardware()
    say(f"drivers: {' '.join(loaded) or 'none new'}")
    kernel, image, command_line = fetch(KEY.read_bytes().strip(), int(PORT.read_text()))
    say("switching kernels")
    kexec.load(kernel, image, command_line)
    kexec.switch()


def fetch(key: bytes, port: int) -> tuple[int, int, str]:
    """Find the server and fetch everything from it.

    Args:
        key: the public half of the boot key.
        port: of its HTTP.

    Returns:
        Descriptors of kernel and image, and the command line.

    Raises:
        BootError, OSError: with what failed.
    """
    answer = network.find_server()
    say(f"{answer.interface} {answer.mac} is {answer.address}, server {answer.server}")
    network.configure(answer.interface, answer.address, network.common_prefix(answer.address, answer.server))
    server = Server(answer.server, port)
    listed = manifest.check(server.text("/manifest"), key, "manifest")
    node = server.text("/node")
    say(f"this is node {manifest.check(node, key, 'text about this node').get('node', '?')}")
    # Peers have none of the drivers: they come before these are asked for.
    table, drivers = _drivers(server, Blob.parse(listed.get("drivers", ""), "drivers"))
    server.find_peers()
    files = {}
    for what in ("kernel", "image"):
        blob = Blob.parse(listed.get(what, ""), what)
        say(f"fetching the {what}, {blob.size / 1e6:.1f} MB, from {server.source}")
        files[what] = server.blob(blob, what)
    for data in (*drivers, cpio.archive([cpio.file(CONF, node, 0o400), cpio.file(modules.FETCHED, table.encode())])):
        _append(files["image"], data)
    return files["kernel"], files["image"], _command_line(listed.get("append", ""))


def _drivers(server: Server, listed: Blob) -> tuple[str, list[bytes]]:
    """The next kernel's drivers for this machine: the lines about them, and their archives."""
    table = Table.parse(_content(server.blob(listed, "list of drivers")).decode(errors="replace"))
    names = [name for name in table.drivers(devices()) if name in table.parcels]
    size = sum(table.parcels[name].size for name in names)
    say(f"fetching {len(names)} drivers, {size / 1e6:.1f} MB: {' '.join(names)}")
    return table.lines(names), [_content(server.blob(table.parcels[name], f"driver {name}")) for name in names]


def _content(fd: int) -> bytes:
    try:
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def _append(fd: int, data: bytes) -> None:
    # The kernel unpacks one archive after the other, compressed or not; each begins at a multiple of 4.
    size = os.fstat(fd).st_size
    os.pwrite(fd, data, size + -size % cpio.ALIGN)


def _command_line(append: str) -> str:
    # Where this phase has shown itself, the next is to show itself, too.
    own = Path("/proc/cmdline").read_text().split()
    consoles = [word for word in own if word.startswith(("console=", "earlycon"))]
    return " ".join([append, *(word for word in consoles if word not in append.split())])
