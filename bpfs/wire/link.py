"""A link: one TCP connection between master and slave that carries notices and requests both ways.

Built for low latency: a message is sent by the task that has it, straight into the socket, and an answer wakes the
task that waits for it; no queue lies between unless the socket is full. Requests in both directions share the link
and are answered in any order.

Handlers are a table from message type to function:

* a plain function is called by the reader itself, in the order of arrival; it must not take long;
* an async function runs as a task of its own, and is cancelled when the peer no longer waits or the link ends.

What a handler returns is the reply (None: `Done`). A `BpfsError` goes back as errno and sentence; any other
exception is a fault of ours: logged, and answered with EIO.
"""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from errno import EAGAIN, EIO, ENOSYS, ETIMEDOUT
from inspect import iscoroutine
from typing import Any, TypeAlias

import trio

from bpfs import log
from bpfs.errors import BpfsError, LinkClosed, ProtocolError, RemoteError
from bpfs.wire import codec
from bpfs.wire.codec import Frame, Kind
from bpfs.wire.messages import Done, Message

_log = log.get("wire")

CHUNK = 256 * 1024
"""Bytes read at once."""
HIGH_WATER = 1 << 20
"""Bytes waiting to be sent above which `notify` and `request` wait."""
SILENT = 0.1
"""What a peer that is silent already gets of the time for an answer."""
OVERFLOW = 32 << 20
"""Bytes waiting to be sent at which the peer is given up: it has stopped reading."""
MAX_SERVED = 4096
"""Requests of the peer that may be under way at once; blocking reads of files count, so it is generous."""

_scratch = bytearray(CHUNK)
"""Where all links read into, one at a time: a buffer of this size a read would be mapped and unmapped each time."""

Handler: TypeAlias = Callable[[Any], "Message | Awaitable[Message | None] | None"]
Handlers: TypeAlias = Mapping[type[Message], Handler]


def now() -> float:
    """Seconds of CLOCK_BOOTTIME: leases must run on while a machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Link:
    """One connection; `run` works it until it ends."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        """Args:
        sock: a connected stream socket; the link owns it from now on.
        name: who the peer is, for messages to people.
        """
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.name = name
        self.patience: float | None = None
        """Seconds that who asks the peer for something usually waits for its answer; None: for ever."""
        self.heard = now()
        """When the peer last sent anything, by `now()`."""
        self.reason = ""
        """Why the link ended; empty while it lives."""
        self._silent_at = 0.0  # when one last timed out while it said nothing; it is silent until it is heard again
        self.local_address = _address_of(sock)
        """The address by which the peer reaches this machine."""
        self.peer_address = _address_of(sock, socket.socket.getpeername)
        """The address by which this machine reaches the peer."""
        self._sock = sock
        self._ids = itertools.count(1)
        self._waiting: dict[int, tuple[trio.lowlevel.Task, list[Frame | None], Callable[[], None] | None]] = {}
        self._serving: dict[int, trio.CancelScope] = {}
        self._out = bytearray()
        self._has_out = trio.Event()
        self._drained = trio.Event()
        self._handlers: Handlers = {}
        self._nursery: trio.Nursery | None = None
        self._detached = False

    # -- the handshake's way: one frame at a time, never a byte too many ---------------------------

    async def receive(self, limit: int = codec.HANDSHAKE_LIMIT) -> Message:
        """The next notice, read exactly (what follows it stays in the socket).

        Raises:
            ProtocolError: it is no notice.
            LinkClosed: the connection ended.
        """
        length = codec.frame_length(await self._receive_exactly(codec.HEADER), limit)
        frame = codec.decode(await self._receive_exactly(length))
        if frame.kind is not Kind.NOTICE or frame.message is None:
            raise ProtocolError(f"sent a {frame.kind.name.lower()} in the handshake")
        return frame.message

    async def _receive_exactly(self, count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                data = self._sock.recv(count - len(got))
            except BlockingIOError:
                continue
            except OSError as error:
                raise LinkClosed(f"{self.name}: {error.strerror}") from None
            if not data:
                raise LinkClosed(f"{self.name} closed the connection" + (" within a frame" if got else ""))
            got += data
        return bytes(got)

    async def wait_closed_by_peer(self) -> None:
        """Wait until the peer closes; whatever it still sends is thrown away."""
        with suppress(LinkClosed):
            while True:
                await self._receive_exactly(1)

    def detach(self) -> socket.socket:
        """Take the socket out: it is to carry other things than frames."""
        self._detached = True
        return self._sock

    def reattach(self) -> None:
        """Take the socket back: nobody wanted it."""
        self._detached = False

    def shutdown_sending(self) -> None:
        """Say that nothing more will be sent; what was sent still arrives."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    # -- sending -----------------------------------------------------------------------------------

    def notify_nowait(self, message: Message) -> None:
        """Send a notice from code that cannot wait.

        Raises:
            LinkClosed: the link is gone.
        """
        self._send(codec.encode(Kind.NOTICE, 0, message))

    async def notify(self, message: Message) -> None:
        """Send a notice; waits while the peer is slow.

        Raises:
            LinkClosed: the link is gone.
        """
        self._send(codec.encode(Kind.NOTICE, 0, message))
        await self._below_high_water()

    async def request(
        self, message: Message, timeout: float | None = None, replied: Callable[[], None] | None = None
    ) -> Any:
        """Send a request and wait for its reply. Cancelling it cancels the peer's handler.

        Args:
            message: the request.
            timeout: seconds, or None. A peer that was silent all the time of a request, and still is, gets a tenth of
                it: undoing what that was a part of shall not take as long for each step.
            replied: called when the reply is read, before anything that the peer has sent after it is taken.

        Raises:
            RemoteError: the peer's handler raised; errno and sentence are its own.
            LinkClosed: the link ended before the reply came.
            BpfsError: ETIMEDOUT.
        """
        if timeout is None:
            return await self._request(message, replied)
        began = now()
        if self.heard < self._silent_at:
            timeout *= SILENT
        with trio.move_on_after(timeout) as scope:
            return await self._request(message, replied)
        assert scope.cancelled_caught
        if self.heard < began:
            self._silent_at = now()
        raise BpfsError(ETIMEDOUT, f"{self.name} did not answer within {timeout:g} s")

    async def _request(self, message: Message, replied: Callable[[], None] | None) -> Message:
        frame_id = next(self._ids)
        await trio.lowlevel.checkpoint_if_cancelled()
        self._send(codec.encode(Kind.REQUEST, frame_id, message))
        if self.reason:  # what waited to be sent was too much
            raise LinkClosed(f"the link to {self.name} ended: {self.reason}")
        box: list[Frame | None] = []
        self._waiting[frame_id] = (trio.lowlevel.current_task(), box, replied)
        abandoned = False

        def abandon(_raise_cancel: object) -> trio.lowlevel.Abort:
            nonlocal abandoned
            # Now: the reply may be read before this task runs again, and must not wake it once more.
            abandoned = self._waiting.pop(frame_id, None) is not None
            return trio.lowlevel.Abort.SUCCEEDED

        try:
            await trio.lowlevel.wait_task_rescheduled(abandon)
        finally:
            if abandoned and not self.reason:
                with suppress(LinkClosed):
                    self._send(codec.encode_cancel(frame_id))
        frame = box[0]
        if frame is None:
            raise LinkClosed(f"the link to {self.name} ended: {self.reason}")
        if frame.message is None:
            raise RemoteError(frame.errno, frame.text)
        return frame.message

    def _send(self, data: bytes) -> None:
        if self.reason:
            raise LinkClosed(f"the link to {self.name} ended: {self.reason}")
        sent = 0
        if not self._out:
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                pass
            except OSError as error:
                self.close(error.strerror or "cannot send")
                raise LinkClosed(f"the link to {self.name} ended: {self.reason}") from None
        if sent < len(data):
            self._out += memoryview(data)[sent:]
            self._has_out.set()
            if len(self._out) > OVERFLOW:
                self.close("the peer has stopped reading")

    async def _below_high_water(self) -> None:
        while len(self._out) > HIGH_WATER and not self.reason:
            await self._drained.wait()

    async def _write_loop(self) -> None:
        # Works only while the socket is full; otherwise senders write for themselves.
        while True:
            await self._has_out.wait()
            while self._out:
                await trio.lowlevel.wait_writable(self._sock)
                try:
                    del self._out[: self._sock.send(memoryview(self._out)[:CHUNK].tobytes())]
                except BlockingIOError:
                    continue
                except OSError as error:
                    self.close(error.strerror or "cannot send")
                    return
                if len(self._out) <= HIGH_WATER:
                    self._drained.set()
                    self._drained = trio.Event()
            self._has_out = trio.Event()

    # -- working the link --------------------------------------------------------------------------

    async def run(self, handlers: Handlers) -> str:
        """Serve the link until it ends; gives the reason as a sentence. When it returns, no handler runs any more."""
        self._handlers = handlers
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self.reason:
                    return self.reason
                nursery.start_soon(self._write_loop, name=f"link {self.name}: write")
                await self._read_loop()
                nursery.cancel_scope.cancel()
        finally:
            self._nursery = None
            self.close("ended by this side")
        return self.reason

    async def _read_loop(self) -> None:
        decoder = codec.Decoder()
        while not self.reason:
            try:
                await trio.lowlevel.wait_readable(self._sock)
                size = self._sock.recv_into(_scratch)
            except BlockingIOError:
                continue
            except trio.ClosedResourceError:
                return
            except OSError as error:
                self.close(error.strerror or "cannot receive")
                return
            if not size:
                self.close("the peer closed the connection")
                return
            self.heard = now()
            data = bytes(memoryview(_scratch)[:size])
            try:
                for frame in decoder.feed(data):
                    self._take(frame)
            except ProtocolError as error:
                _log.warning("%s sent what %s", self.name, error)
                self.close(f"sent what {error}")

    def _take(self, frame: Frame) -> None:
        if frame.kind in (Kind.REPLY, Kind.ERROR):
            waiter = self._waiting.pop(frame.id, None)
            if waiter is not None:  # else: nobody waits any more
                task, box, replied = waiter
                box.append(frame)
                if replied is not None:
                    replied()
                trio.lowlevel.reschedule(task)
        elif frame.kind is Kind.CANCEL:
            scope = self._serving.get(frame.id)
            if scope is not None:
                scope.cancel()
        else:
            self._serve(frame)

    def _serve(self, frame: Frame) -> None:
        message = frame.message
        assert message is not None
        handler = self._handlers.get(type(message))
        if handler is None:
            _log.warning("%s sent a %s, which nobody here handles", self.name, type(message).__name__)
            return self._fail(frame, ENOSYS, f"{type(message).__name__} is not handled here")
        if len(self._serving) >= MAX_SERVED:
            return self._fail(frame, EAGAIN, "too many requests under way")
        try:
            result = handler(message)
        except Exception as error:
            return self._fail_with(frame, error)
        if iscoroutine(result):
            if self._nursery is None:  # the link ended within this very handler
                result.close()
                return None
            scope = trio.CancelScope()
            if frame.kind is Kind.REQUEST:
                self._serving[frame.id] = scope
            self._nursery.start_soon(self._serve_async, frame, scope, result, name=type(message).__name__)
        else:
            self._reply(frame, result)  # type: ignore[arg-type]
        return None

    async def _serve_async(self, frame: Frame, scope: trio.CancelScope, work: Awaitable[Message | None]) -> None:
        try:
            with scope:
                try:
                    result = await work
                except Exception as error:
                    self._fail_with(frame, error)
                else:
                    self._reply(frame, result)
        finally:
            if frame.kind is Kind.REQUEST:
                self._serving.pop(frame.id, None)

    def _reply(self, frame: Frame, result: Message | None) -> None:
        if frame.kind is not Kind.REQUEST:
            return
        with suppress(LinkClosed):
            try:
                self._send(codec.encode(Kind.REPLY, frame.id, result if result is not None else Done()))
            except ProtocolError as error:
                self._fail_with(frame, error)

    def _fail(self, frame: Frame, errno: int, text: str) -> None:
        if frame.kind is Kind.REQUEST:
            with suppress(LinkClosed):
                self._send(codec.encode_error(frame.id, errno, text))

    def _fail_with(self, frame: Frame, error: Exception) -> None:
        if isinstance(error, BpfsError):
            if frame.kind is not Kind.REQUEST:
                _log.warning("%s: %s failed: %s", self.name, type(frame.message).__name__, error)
            return self._fail(frame, error.code, error.sentence)
        _log.error("%s: %s failed", self.name, type(frame.message).__name__, exc_info=error)
        if isinstance(error, OSError):
            return self._fail(frame, error.errno or EIO, error.strerror or str(error))
        return self._fail(frame, EIO, f"internal error: {type(error).__name__}")

    # -- the end -----------------------------------------------------------------------------------

    def close(self, reason: str) -> None:
        """End the link now; whoever waits for a reply gets `LinkClosed`. May be called at any time, again too."""
        if self.reason:
            return
        self.reason = reason or "closed"
        if not self._detached:
            with suppress(OSError):
                trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
        waiting, self._waiting = self._waiting, {}
        for task, box, _ in waiting.values():
            box.append(None)
            trio.lowlevel.reschedule(task)
        self._out.clear()
        self._drained.set()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()


def _address_of(sock: socket.socket, end: Callable[[socket.socket], object] = socket.socket.getsockname) -> str:
    try:
        name = end(sock)
    except OSError:
        return ""  # closed already
    return str(name[0]) if isinstance(name, tuple) else ""  # a socket pair has none
