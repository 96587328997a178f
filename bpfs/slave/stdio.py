"""The master's requests about stdio of jobs on this node: ends made, joined to ghosts, and taken away."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EINVAL
from typing import Final

import trio

from bpfs.errors import BpfsError, LinkClosed, ProtocolError
from bpfs.slave.enginehost import HeldFds
from bpfs.slave.keeper import Keeper
from bpfs.slave.line import Line
from bpfs.slave.noghost import NoGhost
from bpfs.slave.options import SlaveOptions
from bpfs.slave.relay import Ends, Front, Listed, Relay, StreamBroke, StreamEnded, make_channel_ends
from bpfs.wire.messages import MakeJob, Plain, RelayAttach, RelayAttached, RelayDetach, RelayLost
from bpfs.wire.mux import ChanKind, Channel
from bpfs.wire.streams import open_stream
from engine.terminals import STOPPED, foreground, order_foreground

FRONT_SECONDS: Final = 1.0  # a placeholder takes 0.1 ms, where it need not wait for a processor
FRONT_LOOK: Final = 0.0003  # seconds between looks


@dataclass(slots=True)
class _Terminal:
    """A session's controlling terminal on this node, while jobs of it have it."""

    master: int
    streams: set[int] = field(default_factory=set)


class Terminals:
    """The controlling terminals of this node, by session."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._terminals: dict[int, _Terminal] = {}
        for session, kept in keeper.of("terminal"):
            self._terminals[session] = _Terminal(kept.fds[0])
        for stream, kept in keeper.of("stream"):
            session = int(kept.value[0])
            if session in self._terminals:
                self._terminals[session].streams.add(stream)

    def master(self, session: int) -> int:
        """The master side of a session's terminal; -1: it has none yet."""
        known = self._terminals.get(session)
        return known.master if known is not None else -1

    def session(self, stream: int) -> int:
        """The session of whose terminal this is a stream; 0: of none."""
        return next((sid for sid, known in self._terminals.items() if stream in known.streams), 0)

    def take(self, session: int, stream: int, ends: Ends) -> None:
        """A stream of a session's terminal is about to be attached."""
        if not session or ends.master < 0:
            return
        if session not in self._terminals:
            self._keeper.keep(("terminal", session), None, [ends.master])
            self._terminals[session] = _Terminal(ends.master)
            ends.master = -1
        self._terminals[session].streams.add(stream)

    def drop(self, stream: int) -> None:
        """The stream has ended. With the last one the terminal ends."""
        session = self.session(stream)
        if not session:
            return
        known = self._terminals[session]
        known.streams.remove(stream)
        if not known.streams:
            del self._terminals[session]
            self._keeper.drop(("terminal", session))
            os.close(known.master)


class StdioHost:
    """Serves RelayAttach and RelayDetach.

    Attributes:
        init: pid of the job space's init; 0 as long as there is none.
        broken: streams whose connection has ended, and which are held here all the same.
    """

    def __init__(self, relay: Relay, held: HeldFds, options: SlaveOptions, link: Line, keeper: Keeper) -> None:
        self._keeper = keeper
        self._relay = relay
        self._held = held
        self._options = options
        self._link = link
        self._terminals = Terminals(keeper)
        self.init = 0
        self.broken: set[int] = set()
        # Of each stream.
        self._channels = {stream: parse_channels(kept.value[1]) for stream, kept in keeper.of("stream")}
        self._listed = trio.Event()

    async def take_up(self) -> None:
        """Learn what the life before did not live to hear, and have `broken` be of now."""
        await self._relay.list_streams()
        await self._listed.wait()

    async def attach(self, message: RelayAttach) -> RelayAttached:
        """Handler: make a job's ends, join them to a new stream to its ghost, hold the job's ends for the engine."""
        ends = await self.join(message)
        try:
            return self._hold(ends)
        finally:
            ends.close()

    async def join(self, message: RelayAttach | MakeJob) -> Ends:
        """Make a job's ends and join them to a new stream to its ghost; the job's ends are the caller's to close.

        Raises:
            BpfsError: there is no such stream then.
        """
        session, stream = message.session, message.stream
        try:
            shared = self._terminals.master(session)
            channels, front = parse_channels(message.channels), message.front != 0
            ends = make_channel_ends(channels, message.uid, message.gid, shared, front)
        except OSError as error:
            raise BpfsError(error.errno or EINVAL, f"no pipes or terminals for the job: {error.strerror}") from None
        try:
            self._keeper.keep(("stream", stream), [session if ends.master >= 0 else 0, message.channels])
            self._terminals.take(session, stream, ends)
            connection = await open_stream(self._options.host, self._options.port, message.token)
            await self._relay.attach(stream, connection, ends, session != 0, message.front)
            self.broken.discard(stream)
            self._channels.setdefault(stream, channels)
        except BaseException as error:
            self._forget(stream)
            ends.close()
            if not isinstance(error, OSError) or isinstance(error, BpfsError):
                raise
            raise BpfsError(error.errno or EINVAL, f"no stream to the master: {error.strerror}") from None
        return ends

    def _hold(self, ends: Ends) -> RelayAttached:
        found = name_ends(ends)
        keys = tuple(ends.job)
        handles = tuple(self._held.hold(fd, lasting=False) for fd in ends.job.values())
        ends.job.clear()
        return RelayAttached(handles, keys, found, ends.terminal or "")

    async def detach(self, message: RelayDetach) -> None:
        """Handler: close a stream and the relay's ends of it."""
        await self._relay.detach(message.stream)

    async def drop(self, stream: int) -> None:
        """Close a stream whose job has not come to be, even while we are cancelled."""
        with trio.CancelScope(shield=True), suppress(BpfsError):
            await self._relay.detach(stream)

    async def do_without_ghosts(self, nursery: trio.Nursery) -> None:
        """Have all that jobs still write dropped, and all that they read at its end: their ghosts are gone."""
        for stream, channels in list(self._channels.items()):
            ours, theirs = socket.socketpair()
            await self._relay.attach(stream, theirs, Ends())
            nursery.start_soon(NoGhost(trio.SocketStream(trio.socket.from_stdlib_socket(ours)), channels).run)

    async def watch(self) -> None:
        """Tells the master which streams broke, and does what iorelay asks for; never returns while iorelay lives."""
        async for event in self._relay.events:
            match event:
                case StreamBroke():
                    self.broken.add(event.stream)
                    with suppress(LinkClosed):
                        self._link.notify_nowait(RelayLost(event.stream, "the stream to the ghost broke"))
                case StreamEnded():
                    self._forget(event.stream)
                case Listed():
                    self._compare(event.streams)
                case Front():
                    await self._put_in_front(event)
                    await self._relay.fronted(event.order)

    def _forget(self, stream: int) -> None:
        self.broken.discard(stream)
        self._channels.pop(stream, None)
        self._terminals.drop(stream)
        self._keeper.drop(("stream", stream))

    def _compare(self, streams: Mapping[int, bool]) -> None:
        for stream in self._channels.keys() - streams.keys():
            self._forget(stream)
        self.broken = {stream for stream, is_broken in streams.items() if is_broken}
        self._listed.set()

    async def _put_in_front(self, event: Front) -> None:
        session = self._terminals.session(event.stream)
        if not session or not self.init:
            return
        with suppress(OSError):
            wanted = order_foreground(self.init, session, event.group)
            with trio.move_on_after(FRONT_SECONDS):
                while wanted and foreground(self.init, session) not in (wanted, STOPPED):
                    await trio.sleep(FRONT_LOOK)


def name_ends(ends: Ends) -> list[list[int]]:
    """st_dev and st_ino of each of a job's ends, and the number of its channel."""
    numbers = {external["key"]: channel.number for channel in ends.channels for external in channel.externals}
    found = []
    for key, fd in ends.job.items():
        status = os.fstat(fd)
        found.append([status.st_dev, status.st_ino, numbers[key]])
    return found


def parse_channels(table: Plain) -> list[Channel]:
    """The channels of a RelayAttach.

    Raises:
        ProtocolError: it is no such table.
    """
    try:
        return [
            Channel(int(number), ChanKind(kind), int(access), tuple(dict(external) for external in externals))
            for number, kind, access, externals in table
        ]
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"is no channel table: {error}") from None
