"""Driving engine workers from trio: one worker, one socket, one request at a time.

A worker is a process of its own that the daemon's zygote forks; it speaks msgpack maps over a SEQPACKET socket,
with descriptors by SCM_RIGHTS (engine/worker.py). Closing the socket is how a session is aborted: the worker undoes
what it has begun.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from errno import EIO, EMSGSIZE
from types import TracebackType
from typing import Any, Protocol

import msgpack
import trio

from bpfs.errors import BpfsError, EngineRefused

PACKET = 256 * 1024
"""Bytes of the longest packet, by the worker's protocol 200 KB."""
MAX_FDS = 253
"""SCM_MAX_FD of the kernel."""


class Zygote(Protocol):
    """What forks workers: engine/zygote.py."""

    def worker(self) -> socket.socket:
        """A new worker's socket; takes about 2 ms."""


class WorkerChannel:
    """The socket of one worker, packets in and out."""

    def __init__(self, sock: socket.socket) -> None:
        """Args:
        sock: the worker's; the channel owns it from now on.
        """
        sock.setblocking(False)
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET)
        self._sock = sock
        self._busy = trio.Lock()
        self.closed = False

    async def exchange(self, body: bytes, fds: Sequence[int] = ()) -> tuple[bytes, list[int]]:
        """Send one request and wait for its reply. Cancelling it closes the channel: a late reply would be taken
        for the next.

        Args:
            body: a msgpack map.
            fds: descriptors to pass; they stay the caller's.

        Returns:
            The reply and the descriptors that came with it, which are the caller's now.

        Raises:
            BpfsError: EIO where the worker has died; EMSGSIZE.
        """
        if len(body) > PACKET:
            raise BpfsError(EMSGSIZE, f"a request of {len(body)} bytes is too long for an engine worker")
        async with self._busy:
            try:
                await self._send(body, fds)
                return await self._receive()
            except OSError as error:
                self.close()
                if isinstance(error, BpfsError):
                    raise
                raise BpfsError(EIO, f"the engine worker has died ({error.strerror})") from None
            except BaseException:
                self.close()
                raise

    async def _send(self, body: bytes, fds: Sequence[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while True:
            self._expect_open()
            try:
                self._sock.sendmsg([body], ancillary, socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)

    async def _receive(self) -> tuple[bytes, list[int]]:
        space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
        while True:
            self._expect_open()
            try:
                await trio.lowlevel.wait_readable(self._sock)
                data, ancillary, flags, _ = self._sock.recvmsg(PACKET, space, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                continue
            except trio.ClosedResourceError:
                raise BpfsError(EIO, "the engine session was closed") from None
            fds = array.array("i")
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
            if not data or flags & socket.MSG_TRUNC:
                for fd in fds:
                    os.close(fd)
                raise BpfsError(EIO, "the engine worker has died" if not data else "the engine's answer is too long")
            return data, list(fds)

    def _expect_open(self) -> None:
        if self.closed:
            raise BpfsError(EIO, "the engine session was closed")

    async def wait_dead(self) -> None:
        """Wait until the worker has ended, without taking anything it sends. Only while no exchange is under way."""
        while not self.closed:
            try:
                await trio.lowlevel.wait_readable(self._sock)
                if not self._sock.recv(1, socket.MSG_PEEK):
                    return
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError):
                return

    def close(self) -> None:
        """End the session; the worker undoes what was not finished."""
        if not self.closed:
            self.closed = True
            with suppress(OSError):
                trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    def detach(self) -> socket.socket:
        """Take the socket out, between two exchanges.

        Raises:
            BpfsError: EIO, it was closed.
        """
        self._expect_open()
        self.closed = True
        return self._sock


class EngineSession:
    """One worker, by its operations."""

    def __init__(self, sock: socket.socket) -> None:
        """Args:
        sock: the worker's; the session owns it from now on.
        """
        self._channel = WorkerChannel(sock)

    async def call(self, op: str, fds: Sequence[int] = (), **args: Any) -> tuple[dict[str, Any], list[int]]:
        """Run one operation of engine/worker.py.

        Args:
            op: its name.
            fds: descriptors for it; they stay the caller's.
            args: its arguments.

        Returns:
            The reply's map and the descriptors that came with it.

        Raises:
            EngineRefused: the worker said no.
            BpfsError: EIO where it has died.
        """
        reply, received = await self._channel.exchange(pack_call(op, args), fds)
        try:
            return unpack_reply(reply), received
        except BaseException:
            for fd in received:
                os.close(fd)
            raise

    def close(self) -> None:
        """End the session; the worker undoes what was not finished."""
        self._channel.close()

    async def aclose(self) -> None:
        """`close`, for `async with` and exit stacks."""
        self._channel.close()

    async def __aenter__(self) -> EngineSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()


def pack_call(op: str, args: dict[str, Any]) -> bytes:
    """The packet of a request."""
    packed: bytes = msgpack.packb({"op": op, **args}, unicode_errors="surrogateescape")
    return packed


def unpack_reply(reply: bytes) -> dict[str, Any]:
    """The map of a reply.

    Raises:
        EngineRefused: the worker said no.
        BpfsError: EIO, the reply is nonsense.
    """
    try:
        answer = msgpack.unpackb(reply, strict_map_key=False, unicode_errors="surrogateescape")
    except Exception:
        raise BpfsError(EIO, "the engine's answer is no msgpack") from None
    if not isinstance(answer, dict):
        raise BpfsError(EIO, "the engine's answer is no map")
    if not answer.get("ok"):
        refusals = [str(word) for word in answer.get("refusals") or ()]
        raise EngineRefused(int(answer.get("errno") or EIO), str(answer.get("text") or "the engine failed"), refusals)
    return answer


class Workers:
    """Hands out workers of a zygote, one of which is kept ready."""

    SPARE_AFTER = 0.02
    """Seconds after a session began until the next worker is made: not while its move is in a hurry."""
    FIRST_AFTER = 1.0
    """Seconds after the daemon's start until the first is made: not while 64 of them start at once."""

    def __init__(self, zygote: Zygote) -> None:
        self._zygote = zygote
        self._spare: socket.socket | None = None
        self._wanted = trio.Event()

    def open_socket(self, comes_back: bool = False) -> socket.socket:
        """A worker's socket.

        Args:
            comes_back: it will be given back soon, so that no other has to be made in its place.

        Raises:
            BpfsError: EIO where the zygote cannot make one.
        """
        sock, self._spare = self._spare, None
        if sock is not None and not _is_dead(sock):
            if not comes_back:
                self._wanted.set()
            return sock
        if sock is not None:
            sock.close()
        try:
            sock = self._zygote.worker()
        except OSError as error:
            raise BpfsError(EIO, f"no engine worker can be made: {error.strerror or error}") from None
        self._wanted.set()
        return sock

    def open(self) -> EngineSession:
        """A session with a worker.

        Raises:
            BpfsError: EIO where the zygote cannot make one.
        """
        return EngineSession(self.open_socket())

    def give_back(self, sock: socket.socket) -> None:
        """Take a worker's socket back from a session after which nothing is to be undone: the next one gets it."""
        if self._spare is None:
            self._spare = sock
        else:
            sock.close()

    async def keep_spare(self) -> None:
        """Make the first spare worker, and another whenever one was taken; never returns."""
        try:
            await trio.sleep(self.FIRST_AFTER)
            while True:
                if self._spare is None:
                    with suppress(OSError):
                        self._spare = self._zygote.worker()
                await self._wanted.wait()
                self._wanted = trio.Event()
                await trio.sleep(self.SPARE_AFTER)
        finally:
            if self._spare is not None:
                self._spare.close()


def _is_dead(sock: socket.socket) -> bool:
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
