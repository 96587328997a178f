"""The HTTP server of the boot server: a manifest, a text about the node that asks, two files, and nodes that pass these
on. There is nothing else that a path could reach: paths are looked up in a table, and never in a file system.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from boot import manifest, signature
from boot.directory import Directory
from boot.errors import BootError
from boot.manifest import Blob
from boot.modules import Table
from boot.pxe import LOADERS, SCRIPT
from boot.reports import Report, Reporter

CONNECTIONS_MOST = 512
"""Connections at once; more are closed at once, and their nodes come again."""
PER_ADDRESS = 4
"""Of those, from one address."""
HEAD_MOST = 8192
HEAD_TIMEOUT = 10.0
"""Seconds for a request to be there."""
SLICE = 1 << 20
"""Bytes after which progress is told, and slow readers are looked at."""
SLICE_TIMEOUT = 30.0
"""Seconds that a reader may take for a slice."""

SIGNATURES_MOST = 4096
"""Texts whose signatures are remembered: one a node, and the manifest."""

SEED_SILENCE = 150.0
"""Seconds after which a node that has passed files on is taken to have stopped: it tells every 60."""
PEERS_TOLD = 8

_log = logging.getLogger("boot")

_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{0,15})")
_REASONS = {200: "OK", 206: "Partial Content", 400: "Bad Request", 403: "Forbidden", 404: "Not Found",
            405: "Method Not Allowed", 416: "Range Not Satisfiable", 503: "Service Unavailable"}  # fmt: skip
_NAMES = ("kernel", "image", "drivers")
_PROGRESS = re.compile(rf"/progress/({'|'.join(_NAMES)})/(\d\d?|100)")

STATIC = (*LOADERS, SCRIPT, "phase1.vmlinuz", "phase1.img")
"""What network ROMs fetch. There is no secret in it, and it is there only where `bpboot` has put it."""


class Refused(Exception):
    """A request is answered with this status."""

    def __init__(self, status: int) -> None:
        super().__init__(_REASONS[status])
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """What of a request counts."""

    method: str
    path: str
    start: int
    end: int | None  # first byte that is not wanted any more; None: to the end


def parse(head: bytes) -> Request:
    """Read a request's head. Raises Refused."""
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise Refused(400)
    if words[0] not in ("GET", "HEAD"):
        raise Refused(405)
    start, end = 0, None
    for line in lines[1:]:
        name, _, value = line.partition(":")
        if name.lower() == "range" and (found := _RANGE.fullmatch(value.strip())):
            start = int(found[1])
            end = int(found[2]) + 1 if found[2] else None
    return Request(words[0], words[1], start, end)


class HttpServer:
    """Serves one folder's manifest and what it lists."""

    def __init__(self, folder: Path, key: Path, directory: Callable[[], Directory], reporter: Reporter) -> None:
        """Args:
        key: the boot key, which signs what is said.
        """
        self._folder = folder
        self._key = key
        self._seeds: dict[str, float] = {}  # addresses of nodes that pass files on, and when they said so
        self._signatures: dict[bytes, bytes] = {}
        self._parcels: tuple[str, dict[str, Blob]] = ("", {})  # the list of drivers that was read last, and its content
        self._directory = directory
        self._reporter = reporter
        self._connections: dict[str, int] = {}
        self._server: asyncio.Server | None = None

    async def start(self, address: str, port: int) -> int:
        """Listen; gives the port. Raises OSError."""
        self._server = await asyncio.start_server(self._serve, address, port, backlog=1024, limit=HEAD_MOST)
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    # -- one connection ----------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = str(writer.get_extra_info("peername")[0])
        count = self._connections.get(address, 0)
        self._connections[address] = count + 1
        try:
            if count >= PER_ADDRESS or sum(self._connections.values()) > CONNECTIONS_MOST:
                await self._say(writer, 503)
            else:
                await self._answer(reader, writer, address)
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            pass  # it went away, said nothing in time, or too much
        finally:
            left = self._connections[address] - 1
            if left:
                self._connections[address] = left
            else:
                del self._connections[address]
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str) -> None:
        async with asyncio.timeout(HEAD_TIMEOUT):
            head = await reader.readuntil(b"\r\n\r\n")
        try:
            request = parse(head)
            if (words := self._words(request.path, address)) is not None:
                await self._say(writer, 200, "".join(f"{word}\n" for word in words).encode(), request.method == "HEAD")
                return
            if request.path in ("/manifest", "/node"):
                values = self._manifest() if request.path == "/manifest" else self._text(address)
                # In a thread: openssl takes some milliseconds, and others are served meanwhile.
                text = await asyncio.to_thread(manifest.signed, values, self._sign)
                await self._say(writer, 200, text, request.method == "HEAD")
                return
            what, blob = self._blob(request.path)
            await self._send(writer, request, what, blob, address)
        except Refused as refusal:
            await self._say(writer, refusal.status)

    async def _say(self, writer: asyncio.StreamWriter, status: int, body: bytes = b"", head_only: bool = False) -> None:
        writer.write(_head(status, len(body)) + (b"" if head_only else body))
        async with asyncio.timeout(SLICE_TIMEOUT):
            await writer.drain()

    # -- what there is -----------------------------------------------------------------------------

    def _listed(self) -> dict[str, str]:
        try:
            text = (self._folder / manifest.FILE).read_text()
        except (OSError, ValueError):
            raise Refused(404) from None
        return {name: value for name, _, value in (line.partition(" ") for line in text.splitlines())}

    def _manifest(self) -> dict[str, str]:
        return self._listed() | {"append": self._directory().command_line}

    def _sign(self, text: bytes) -> bytes:
        """A signature; one that was made before is taken again, so that a flood of requests costs no power."""
        known = self._signatures.get(text)
        if known is None:
            if len(self._signatures) >= SIGNATURES_MOST:
                self._signatures.clear()
            try:
                known = self._signatures[text] = signature.sign(text, self._key)
            except BootError as error:
                _log.error("nothing can be signed: %s", error)
                raise Refused(503) from None
        return known

    def _blob(self, path: str) -> tuple[str, Blob]:
        name = path.removeprefix("/")
        if name in STATIC:
            try:
                return name, Blob(name, (self._folder / name).stat().st_size, "")
            except OSError:
                raise Refused(404) from None
        listed = self._listed()
        for what in _NAMES:
            try:
                blob = Blob.parse(listed.get(what, ""), what)
            except BootError:
                continue
            if path == f"/{blob.name}":
                return what, blob
            if what == "drivers" and (parcel := self._drivers(blob.name).get(name)) is not None:
                return what, parcel
        raise Refused(404)

    def _drivers(self, listed: str) -> dict[str, Blob]:
        """The files that the list of drivers names; its name has its digest, so it is read once."""
        if self._parcels[0] != listed:
            try:
                table = Table.parse((self._folder / listed).read_text())
            except (OSError, ValueError, BootError):
                raise Refused(404) from None
            self._parcels = (listed, {blob.name: blob for blob in table.parcels.values()})
        return self._parcels[1]

    def _text(self, address: str) -> dict[str, str]:
        """What the node at this address has to know; it has the cluster key, so the machine must be the known one."""
        return self._directory().texts(self._known(address))

    def _known(self, address: str) -> int:
        directory = self._directory()
        number = directory.by_address(address)
        if number is None or not set(directory.macs_of(number)) & _neighbours(address):
            raise Refused(403)
        return number

    # -- nodes that pass files on ------------------------------------------------------------------

    def _words(self, path: str, address: str) -> list[str] | None:
        """The answer to what is asked or said about them; None where it is something else."""
        if path == "/peers":
            self._seeds.pop(address, None)  # who asks has started anew, and passes nothing on yet
            return self._peers()
        if path == "/seed":
            self._seed(address)
        elif said := _PROGRESS.fullmatch(path):
            self._reporter.tell(Report.PROGRESS, self._known(address), *said.groups())
        else:
            return None
        return ["thanks"]

    def _seed(self, address: str) -> None:
        """A node says that it passes on what the manifest names."""
        number = self._known(address)
        if address not in self._seeds:
            self._reporter.tell(Report.LOG, number, "it passes kernel and image on")
        self._seeds[address] = time.monotonic()

    def _peers(self) -> list[str]:
        """Some that do, by chance; those that were not heard of for a while are forgotten."""
        now = time.monotonic()
        self._seeds = {address: heard for address, heard in self._seeds.items() if now - heard < SEED_SILENCE}
        return random.sample(sorted(self._seeds), min(PEERS_TOLD, len(self._seeds)))

    async def _send(self, writer: asyncio.StreamWriter, request: Request, what: str, blob: Blob, address: str) -> None:
        end = blob.size if request.end is None else min(request.end, blob.size)
        if request.start and request.start >= end:
            raise Refused(416)
        number = self._directory().by_address(address)
        try:
            file = open(self._folder / blob.name, "rb")  # noqa: SIM115, ASYNC230  (a local disk; closed below)
        except OSError:
            raise Refused(404) from None
        with file:
            if os.fstat(file.fileno()).st_size != blob.size:
                raise Refused(404)
            partial = request.start > 0 or request.end is not None
            content = f"bytes {request.start}-{end - 1}/{blob.size}" if partial else ""
            writer.write(_head(206 if partial else 200, end - request.start, content))
            await writer.drain()
            offset = end if request.method == "HEAD" else request.start
            while offset < end:
                size = min(SLICE, end - offset)
                async with asyncio.timeout(SLICE_TIMEOUT):
                    await asyncio.get_running_loop().sendfile(writer.transport, file, offset, size)
                offset += size
                if number is not None:
                    self._reporter.tell(Report.PROGRESS, number, what, 100 * offset // blob.size)


def _head(status: int, length: int, content_range: str = "") -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", f"Content-Length: {length}", "Accept-Ranges: bytes"]
    if content_range:
        lines.append(f"Content-Range: {content_range}")
    return "\r\n".join([*lines, "Content-Type: application/octet-stream", "Connection: close", "", ""]).encode()


def _neighbours(address: str) -> set[str]:
    """The hardware addresses that the kernel has seen behind a network address just now."""
    with open("/proc/net/arp") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    return {row[3].lower() for row in rows if len(row) >= 4 and row[0] == address}
