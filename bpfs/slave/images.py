"""Images of programs that many share: held here for jobs of this node, and for other nodes that ask at the door.

An image travels down a tree of nodes. The master says to each by which name one is coming, and from whom: the node
above, the one above that, and so on. A node that gives says at once `WAIT`, and again and again, while it has none
itself; so silence means that it is dead or hangs, and the next is asked, and the master when none is left. Everything
below a node that hangs loses one timeout, not one a level.

The door is open to whoever knows a name, which is random and came over the authenticated link.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable
from dataclasses import dataclass, field
from errno import EIO, ENOENT, ETIMEDOUT
from typing import Final

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.wire import streams
from bpfs.wire.link import Link
from bpfs.wire.messages import NAME, AskImage, DropImage, HoldImage

BEAT: Final = 0.1  # seconds between two WAITs, far below any timeout (config.LEAST_TREE_TIMEOUT)
UNKNOWN: Final = 2.0  # seconds in which the master may tell of a name that somebody asks for already
PATIENCE: Final = 60.0  # seconds for a guest to take an image in
GUESTS: Final = 512  # connections at once; who comes then has other nodes and the master to ask
MOST: Final = 1 << 20  # bytes of an image: an engine worker takes a quarter of it
WAIT: Final = 0xFFFFFFFF
_HEAD: Final = struct.Struct("!I")  # the length of the image that follows, or WAIT

_log = log.get("slave")


@dataclass(slots=True)
class _Held:
    """An image that is here, or on its way.

    Attributes:
        image: its bytes; None as long as there are none.
        error: why there will be none.
        settled: one of both is there.
        scope: ends its being fetched.
    """

    image: bytes | None = None
    error: BpfsError | None = None
    settled: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Images:
    """Serves HoldImage and DropImage, and whoever wants an image."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._held: dict[bytes, _Held] = {}
        self._news = trio.Event()  # a name has come
        self._guests = 0

    async def open(self, nursery: trio.Nursery) -> int:
        """Opens the door, as long as the nursery lasts.

        Returns:
            Its port; 0 where there can be none.
        """
        try:
            listeners = await trio.open_tcp_listeners(0, host=self._link.local_address)
        except OSError as error:
            _log.warning("no images for other nodes: %s", error)
            return 0
        nursery.start_soon(trio.serve_listeners, self._serve, listeners, name="door for images")
        port: int = listeners[0].socket.getsockname()[1]
        return port

    # -- for this node -----------------------------------------------------------------------------------------

    def hold(self, message: HoldImage) -> Awaitable[None]:
        """Handler: takes an image, or fetches it."""
        held = self._held[message.name] = _Held()
        self._news.set()
        self._news = trio.Event()
        return self._fill(held, message)

    async def _fill(self, held: _Held, message: HoldImage) -> None:
        try:
            with held.scope:
                held.image = message.image or await self._fetch(message)
        except BpfsError as error:
            held.error = error
            _log.warning("no image: %s", error)
        finally:
            held.settled.set()

    def drop(self, message: DropImage) -> None:
        """Handler: forgets an image."""
        held = self._held.pop(message.name, None)
        if held is not None:
            held.scope.cancel()

    async def take(self, name: bytes) -> bytes:
        """The image of this name, as soon as it is here.

        Raises:
            BpfsError: ENOENT, the master has told of none; or why it could not be had.
        """
        with trio.move_on_after(UNKNOWN):
            while name not in self._held:
                await self._news.wait()
        held = self._held.get(name)
        if held is not None:
            await held.settled.wait()
            if held.error is not None:
                raise BpfsError(held.error.code, held.error.sentence)
        if held is None or held.image is None:
            raise BpfsError(ENOENT, "the master has taken the program back")
        return held.image

    async def _fetch(self, message: HoldImage) -> bytes:
        for host, port in message.sources:
            try:
                return await ask(host, port, message.name, message.timeout)
            except OSError as error:
                _log.info("no image from %s: %s; the next one is asked", host, error.strerror)
        reply = await self._link.request(AskImage(message.name))
        image: bytes = reply.image
        return image

    # -- for others --------------------------------------------------------------------------------------------

    async def _serve(self, guest: trio.SocketStream) -> None:
        if self._guests >= GUESTS:
            await guest.aclose()
            return
        self._guests += 1
        try:
            async with guest:
                name = b""
                with trio.move_on_after(UNKNOWN):
                    name = await _receive(guest, NAME)
                if name:
                    await self._give(guest, name)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it does not want it any more
        finally:
            self._guests -= 1

    async def _give(self, guest: trio.SocketStream, name: bytes) -> None:
        deadline = trio.current_time() + UNKNOWN
        while True:
            held = self._held.get(name)
            if held is not None and held.image is not None:
                with trio.move_on_after(PATIENCE):
                    await guest.send_all(_HEAD.pack(len(held.image)) + held.image)
                return
            if trio.current_time() > deadline if held is None else held.settled.is_set():
                return
            await guest.send_all(_HEAD.pack(WAIT))
            with trio.move_on_after(BEAT):
                await (self._news if held is None else held.settled).wait()


async def ask(host: str, port: int, name: bytes, timeout: float) -> bytes:
    """An image from the door of another node.

    Args:
        timeout: seconds of silence, and for the image to come when it is there.

    Raises:
        OSError: it does not have it, or does not answer (ETIMEDOUT).
    """
    silent = f"silent for {timeout:g} s"
    try:
        with trio.fail_after(timeout):
            sock = trio.socket.from_stdlib_socket(await streams.connect(host, port))
        async with trio.SocketStream(sock) as stream:
            await stream.send_all(name)
            length = WAIT
            while length == WAIT:
                with trio.fail_after(timeout):
                    (length,) = _HEAD.unpack(await _receive(stream, _HEAD.size))
            if length > MOST:
                raise OSError(EIO, f"an image of {length} bytes")
            with trio.fail_after(timeout):
                return await _receive(stream, length)
    except trio.TooSlowError:
        raise OSError(ETIMEDOUT, silent) from None
    except trio.BrokenResourceError:
        raise OSError(EIO, "the connection broke") from None


async def _receive(stream: trio.SocketStream, length: int) -> bytes:
    got = bytearray()
    while len(got) < length:
        part = await stream.receive_some(length - len(got))
        if not part:
            raise OSError(ENOENT, "it has none")
        got += part
    return bytes(got)
