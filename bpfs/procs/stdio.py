"""The terminals, pipes and sockets of a process that is away: which channels its ghost has, and their ends on a node.

The ghost on the master keeps the originals. On the node the process has ends of its own (a pipe, a socket pair, a
pseudo-terminal) that the node's iorelay joins to the ghost by one TCP stream. A process that goes on to another node
gets new ends there; one that comes home takes the originals back out of the ghost.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from bpfs.errors import BpfsError, LinkClosed
from bpfs.fdinfo import inode_and_offset
from bpfs.procs.places import NodePlace
from bpfs.wire import messages
from bpfs.wire.link import Link
from bpfs.wire.mux import Channel, channels_of
from bpfs.wire.streams import StreamBook
from engine.linux import process_vm

CONNECT_TIMEOUT = 10.0  # seconds for the node's stream to come in

External = Mapping[str, Any]  # engine/descriptors/external.py


@dataclass(slots=True)
class Stdio:
    """What a ghost relays.

    Attributes:
        comm: the process's name, which its ghost shows.
        channels: by number, with the ghost's own descriptors (those the process had when it left).
        stream: number of the stream to the node where the process is.
        ends: (st_dev, st_ino) of an end on that node -> the channel's number.
        files: the process's number of a regular file as it left -> the slave's handle of the same open file.
    """

    channels: dict[int, Channel] = field(default_factory=dict)
    comm: bytes = b""
    stream: int = 0
    ends: dict[tuple[int, int], int] = field(default_factory=dict)
    files: dict[int, int] = field(default_factory=dict)

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

    def rejoined(self, externals: Iterable[External], ends: Mapping[tuple[int, int], int]) -> list[Channel]:
        """The channels of a process that comes back from an image, with what the engine calls them in it.

        Args:
            ends: as `self.ends`, when the image was made. What was no end of a stream then is told by its number.

        Raises:
            BpfsError: EOPNOTSUPP, it had something that its ghost does not have.
        """
        found: dict[int, list[External]] = {}
        for external in externals:
            number = ends.get((external["dev"], external["ino"]))
            if number not in self.channels:
                common = [n for n, channel in self.channels.items() if set(channel.fds) & set(external["fds"])]
                if not common:
                    raise BpfsError(errno.EOPNOTSUPP, f"its ghost has nothing for fd {external['fds'][0]}")
                number = common[0]
            found.setdefault(number, []).append(external)
        return [replace(self.channels[number], externals=tuple(found[number])) for number in sorted(found)]

    def home_number(self, external: External) -> int:
        """Which of the ghost's descriptors is the original of an end on the node that another process has as well."""
        return _original(self.channels[self.ends[external["dev"], external["ino"]]], external)

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
    """New ends on a node: handles of the slave's descriptors, and which external takes which.

    `terminal` is the path of the pseudo-terminal there; empty where the process has no terminal.
    """

    number: int
    connection: socket.socket
    fds: list[int]
    places: dict[int, int]  # key of an external -> index into fds
    ends: dict[tuple[int, int], int]
    terminal: str


def plain(channels: Iterable[Channel]) -> list[list[Any]]:
    """Channels as a message has them."""
    return [[channel.number, int(channel.kind), channel.access, list(channel.externals)] for channel in channels]


async def attach(
    place: NodePlace, streams: StreamBook, channels: list[Channel], uid: int, gid: int, session: int = 0, front: int = 0
) -> Attached:
    """Has a node make ends for these channels and join them to a new stream.

    Args:
        place, streams, channels: where, how and what.
        uid, gid: whose the ends are.
        session: whose controlling terminal the terminal among the channels is; 0: no session's.
        front: the group of the process, where that is in the terminal's foreground; else 0.

    Raises:
        BpfsError: the node's errno; ETIMEDOUT.
    """
    number = streams.new_number()
    with streams.expect() as expected:
        request = messages.RelayAttach(number, expected.token, plain(channels), uid, gid, session, front)
        try:
            reply = await place.link.request(request, place.link.patience)
            connection = await expected.wait_connected(CONNECT_TIMEOUT)
        except BpfsError:
            await detach(place, number)
            raise
    assert isinstance(reply, messages.RelayAttached)
    ends = {(dev, ino): chan for dev, ino, chan in reply.ends}
    places = {key: index for index, key in enumerate(reply.keys)}
    return Attached(number, connection, list(reply.fds), places, ends, reply.terminal)


async def reconnect(link: Link, streams: StreamBook, stream: int) -> socket.socket:
    """Has a node make a new connection for a stream that is held there.

    Raises:
        BpfsError: the node's errno; ETIMEDOUT.
    """
    with streams.expect() as expected:
        await link.request(messages.RelayAttach(stream, expected.token, [], -1, -1, 0, 0), link.patience)
        return await expected.wait_connected(CONNECT_TIMEOUT)


async def detach(place: NodePlace, stream: int) -> None:
    """Closes a stream and its ends on a node; a node that is gone has closed them already."""
    try:
        await place.link.request(messages.RelayDetach(stream), place.link.patience)
    except BpfsError:
        return


async def drop_files(place: NodePlace, stdio: Stdio) -> None:
    """Gives back the slave's descriptors of files: the process has gone on."""
    handles, stdio.files = tuple(stdio.files.values()), {}
    if handles:
        with suppress(LinkClosed):
            await place.link.notify(messages.FdClose(handles))


async def carry_offsets(link: Link, stdio: Stdio, pid: int) -> None:
    """After a job's end: sets the offsets of its files at home, in the ghost, to where the job left them.

    Shells share these files with the jobs they start: what comes next in a script goes on there.

    Raises:
        BpfsError: the node is gone.
    """
    files, stdio.files = stdio.files, {}
    if not files:
        return
    reply = await link.request(messages.FdWhere(tuple(files.values())), link.patience)
    assert isinstance(reply, messages.FdIsWhere)
    for number, offset, inode in zip(files, reply.offsets, reply.inodes, strict=True):
        if offset >= 0:
            _seek_in(pid, number, offset, inode)


def _seek_in(pid: int, number: int, offset: int, inode: int) -> None:
    try:
        process = os.pidfd_open(pid)
        try:
            fd = process_vm.pidfd_getfd(process, number)
        finally:
            os.close(process)
    except OSError:
        return  # the ghost has just been killed: nobody's offset is left to set
    try:
        # Never fstat: the file may be one of our own tree.
        if inode_and_offset(fd)[0] == inode:
            os.lseek(fd, offset, os.SEEK_SET)
    finally:
        os.close(fd)
