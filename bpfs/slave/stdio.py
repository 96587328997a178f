"""The master's requests about stdio of jobs on this node: ends made, joined to ghosts, and taken away."""

from __future__ import annotations

import os
from contextlib import suppress
from errno import EINVAL

import trio

from bpfs.errors import BpfsError, LinkClosed, ProtocolError
from bpfs.slave.enginehost import HeldFds
from bpfs.slave.options import SlaveOptions
from bpfs.slave.relay import Ends, Relay, StreamBroke, make_channel_ends
from bpfs.wire.link import Link
from bpfs.wire.messages import MakeJob, Plain, RelayAttach, RelayAttached, RelayDetach, RelayLost
from bpfs.wire.mux import ChanKind, Channel
from bpfs.wire.streams import open_stream


class StdioHost:
    """Serves RelayAttach and RelayDetach."""

    def __init__(self, relay: Relay, held: HeldFds, options: SlaveOptions, link: Link) -> None:
        self._relay = relay
        self._held = held
        self._options = options
        self._link = link

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
        try:
            ends = make_channel_ends(parse_channels(message.channels), message.uid, message.gid)
        except OSError as error:
            raise BpfsError(error.errno or EINVAL, f"no pipes or terminals for the job: {error.strerror}") from None
        try:
            connection = await open_stream(self._options.host, self._options.port, message.token)
            await self._relay.attach(message.stream, connection, ends)
        except BaseException as error:
            ends.close()
            if not isinstance(error, OSError) or isinstance(error, BpfsError):
                raise
            raise BpfsError(error.errno or EINVAL, f"no stream to the master: {error.strerror}") from None
        return ends

    def _hold(self, ends: Ends) -> RelayAttached:
        found = name_ends(ends)
        keys = tuple(ends.job)
        handles = tuple(self._held.hold(fd) for fd in ends.job.values())
        ends.job.clear()
        return RelayAttached(handles, keys, found, ends.terminal or "")

    async def detach(self, message: RelayDetach) -> None:
        """Handler: close a stream and the relay's ends of it."""
        await self._relay.detach(message.stream)

    async def drop(self, stream: int) -> None:
        """Close a stream whose job has not come to be, even while we are cancelled."""
        with trio.CancelScope(shield=True), suppress(BpfsError):
            await self._relay.detach(stream)

    async def watch(self) -> None:
        """Tells the master which streams broke; never returns while iorelay lives."""
        async for event in self._relay.events:
            if isinstance(event, StreamBroke):
                with suppress(LinkClosed):
                    self._link.notify_nowait(RelayLost(event.stream, "the stream to the ghost broke"))


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
