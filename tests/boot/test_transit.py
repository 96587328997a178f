"""What breaks or is changed between the boot server and a node: fetched on, or fetched again."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from boot import image, manifest
from boot.directory import Assign, Directory
from boot.errors import BootError
from boot.files import replace
from boot.httpd import HttpServer
from boot.node.fetch import Server
from boot.reports import Reporter

SIZE = 3_000_000


@dataclass
class Wire:
    """A TCP proxy in front of the server that does something to the answers.

    Attributes:
        cut: bytes of an answer after which a connection breaks.
        change: how many answers have a byte changed on their way.
        asked: the ranges that were asked for.
    """

    port: int = 0
    cut: int = 1 << 40
    change: int = 0
    asked: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.asked += [line for line in head.decode().split("\r\n") if line.startswith("Range")] or ["whole"]
        there, back = await asyncio.open_connection("127.0.0.1", self.port)
        back.write(head)
        left, change, self.change = self.cut, self.change > 0, max(0, self.change - 1)
        try:
            while left > 0 and (data := await there.read(min(left, 65536))):
                left -= len(data)
                writer.write(bytes([*data[:-1], data[-1] ^ 1]) if change and len(data) > 1000 else data)
                change = change and len(data) <= 1000
                await writer.drain()
        finally:
            writer.close()
            back.close()


@contextmanager
def wire(folder: Path) -> Iterator[tuple[Wire, Server]]:
    """A boot server of this folder, and a node's view of it through a `Wire`."""
    directory = Directory({}, lambda _: None, Assign.LOCKED, lambda _: None, lambda _: {}, "", OrderedDict())
    it, loop, started = Wire(), asyncio.new_event_loop(), threading.Event()
    ports: list[int] = []

    async def run() -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        http = HttpServer(folder, folder / "bootkey", lambda: directory, Reporter(null))
        it.port = await http.start("127.0.0.1", 0)
        proxy = await asyncio.start_server(it.serve, "127.0.0.1", 0)
        ports.append(proxy.sockets[0].getsockname()[1])
        started.set()
        await ended.wait()
        proxy.close()
        http.close()
        os.close(null)

    ended = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield it, Server("127.0.0.1", ports[0])
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    blob = image.store(tmp_path, "image", os.urandom(SIZE))
    replace(tmp_path / manifest.FILE, f"image {blob}\n".encode())
    return tmp_path


def fetch(folder: Path, server: Server) -> bool:
    """Whether what arrives is what was sent."""
    listed = manifest.Blob.parse((folder / manifest.FILE).read_text().partition(" ")[2], "image")
    fd = server.blob(listed, "image")
    try:
        return hashlib.sha256(os.pread(fd, 2 * SIZE, 0)).hexdigest() == listed.digest
    finally:
        os.close(fd)


def test_a_broken_download_goes_on_where_it_broke(folder: Path) -> None:
    with wire(folder) as (it, server):
        it.cut = 1_200_000
        assert fetch(folder, server)
        assert len(it.asked) == 3 and it.asked[0] == "whole"
        starts = [int(line.split("=")[1].rstrip("-")) for line in it.asked[1:]]
        assert 1_100_000 < starts[0] < 1_200_000 < starts[1] < 2_400_000


def test_what_was_changed_on_its_way_is_fetched_again(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with wire(folder) as (it, server):
        it.change = 1
        assert fetch(folder, server)
        assert it.asked == ["whole", "whole"] and "the image was damaged on its way" in capfd.readouterr().err
        it.change = 3
        with pytest.raises(BootError, match="damaged on its way, 3 times"):
            fetch(folder, server)
