"""The terminals, pipes and sockets of a process that is away: which channels its ghost has, and their ends on a node.

The ghost on the master keeps the originals. On the node the process has ends of its own (a pipe, a socket pair, a
pseudo-terminal) that the node's iorelay joins to the ghost by one TCP stream. A process that goes on to another node
gets new ends there; one that comes home takes the originals back out of the ghost.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bpfs.errors import BpfsError
from bpfs.procs.places import CALL_TIMEOUT, NodePlace
from bpfs.wire import messages
from bpfs.wire.mux import Channel, channels_of
from bpfs.wire.streams import StreamBook

CONNECT_TIMEOUT = 10.0  # seconds for the node's stream to come in
_streams = itertools.count(1)

External = Mapping[str, Any]  # engine/descriptors/external.py


@dataclass(slots=True)
class Stdio:
    """What a ghost relays.

    Attributes:
        channels: by number, with the ghost's own descriptors (those the process had when it left).
        stream: number of the stream to the node where the process is.
        ends: (st_dev, st_ino) of an end on that node -> the channel's number.
    """

    channels: dict[int, Channel] = field(default_factory=dict)
    stream: int = 0
    ends: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def of(cls, externals: Iterable[External]) -> Stdio:
        """The channels of a process that is about to leave the master. Raises BpfsError E2BIG."""
        return cls({channel.number: channel for channel in channels_of(externals)})

    def regroup(self, externals: Iterable[External]) -> list[Channel]:
        """The channels that a process on a node still has, with what the engine calls them there.

        Raises:
            BpfsError: EOPNOTSUPP, it has a pipe, terminal or socket that is no end of a channel.
        """
        found: dict[int, list[External]] = {}
        for external in externals:
            number = self.ends.get((external["dev"], external["ino"]))
            if number is None:
                what = f"fd {external['fds'][0]} is a {external['kind']} to another process on the node"
                raise BpfsError(errno.EOPNOTSUPP, what)
            found.setdefault(number, []).append(external)
        return [replace(self.channels[number], externals=tuple(found[number])) for number in sorted(found)]

    def home_numbers(self, channels: Iterable[Channel]) -> dict[int, int]:
        """Which of the ghost's descriptors each external of the process is: its key -> the number in the ghost."""
        return {
            external["key"]: _original(self.channels[channel.number], external)
            for channel in channels
            for external in channel.externals
        }


def _original(channel: Channel, external: External) -> int:
    # One channel may stand for several open files of one terminal: take the one with a number in common.
    for original in channel.externals:
        common = set(original["fds"]) & set(external["fds"])
        if common:
            return int(min(common))
    best = max(channel.externals, key=lambda original: int(original["access"]) == os.O_RDWR)
    return int(min(best["fds"]))


@dataclass(slots=True)
class Attached:
    """New ends on a node: handles of the slave's descriptors, and which external takes which."""

    number: int
    connection: socket.socket
    fds: list[int]
    places: dict[int, int]  # key of an external -> index into fds
    ends: dict[tuple[int, int], int]


async def attach(place: NodePlace, streams: StreamBook, channels: list[Channel], uid: int, gid: int) -> Attached:
    """Has a node make ends for these channels and join them to a new stream.

    Raises:
        BpfsError: the node's errno; ETIMEDOUT.
    """
    number = next(_streams)
    plain = [[channel.number, int(channel.kind), channel.access, list(channel.externals)] for channel in channels]
    with streams.expect() as expected:
        request = messages.RelayAttach(number, expected.token, plain, uid, gid)
        try:
            reply = await place.link.request(request, CALL_TIMEOUT)
            connection = await expected.wait_connected(CONNECT_TIMEOUT)
        except BpfsError:
            await detach(place, number)
            raise
    assert isinstance(reply, messages.RelayAttached)
    ends = {(dev, ino): chan for dev, ino, chan in reply.ends}
    return Attached(number, connection, list(reply.fds), {key: index for index, key in enumerate(reply.keys)}, ends)


async def detach(place: NodePlace, stream: int) -> None:
    """Closes a stream and its ends on a node; a node that is gone has closed them already."""
    try:
        await place.link.request(messages.RelayDetach(stream), CALL_TIMEOUT)
    except BpfsError:
        return
