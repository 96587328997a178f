"""The way of a program's image to many nodes: down a tree of them, or as a part of each request where they are few.

What the master's link carries does not grow with the nodes then, but for the small requests. The nodes' half, and what
happens when one hangs, is bpfs/slave/images.py.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress

import trio

from bpfs.errors import BpfsError, LinkClosed
from bpfs.fanout import above
from bpfs.nodes.registry import Node
from bpfs.procs.places import LOOPBACK, NodePlace
from bpfs.wire.link import now
from bpfs.wire.messages import NAME, AskImage, DropImage, HoldImage, ImageIs

LOOPBACK_6 = "::1"
LATE = 15.0  # seconds without a heartbeat, of which there is one in ten or less, after which a node is to feed nobody


class ImageTree:
    """Brings images to nodes."""

    def __init__(self, fanout: int, timeout: float) -> None:
        """Args:
        fanout: how many nodes master and nodes feed; 0: the master feeds all.
        timeout: seconds of silence after which a node asks another one.
        """
        self._fanout = fanout
        self._timeout = timeout
        self._images: dict[bytes, bytes] = {}

    @asynccontextmanager
    async def spread(self, image: bytes, jobs: Sequence[NodePlace]) -> AsyncIterator[bytes]:
        """Gives the name by which an image can be had at the places of these jobs, as long as the context lasts.

        Empty: it has to be in each request, which is cheaper for a few nodes with one job each.
        """
        places = list({place.number: place for place in jobs}.values())
        # What is on this very machine has no link to be spared.
        away = sum(place.node.address not in (LOOPBACK, LOOPBACK_6) for place in places)
        fanout = self._fanout if away > self._fanout > 0 else len(places)
        if len(jobs) == len(places) <= fanout:
            yield b""
            return
        name = os.urandom(NAME)
        self._images[name] = image
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell, name, _trusty_first(places), fanout)
                yield name
                nursery.cancel_scope.cancel()
        finally:
            del self._images[name]
            for place in places:
                with suppress(LinkClosed):
                    place.link.notify_nowait(DropImage(name))

    async def _tell(self, name: bytes, places: list[NodePlace], fanout: int) -> None:
        for rank, place in enumerate(places, 1):
            feeders = [places[higher - 1] for higher in above(rank, fanout)]
            sources = tuple((one.node.address, one.door) for one in feeders if one.door)
            image = b"" if sources else self._images[name]
            with suppress(LinkClosed):  # its jobs meet that, too
                await place.link.notify(HoldImage(name, image, sources, self._timeout))
            await trio.lowlevel.checkpoint()

    def asked(self, node: Node, message: AskImage) -> ImageIs:
        """Handler: a node could not have it elsewhere."""
        image = self._images.get(message.name)
        if image is None:
            raise BpfsError(errno.ENOENT, "nobody needs this image any more")
        return ImageIs(image)


def _trusty_first(places: Iterable[NodePlace]) -> list[NodePlace]:
    late = now() - LATE
    return sorted(places, key=lambda place: not place.door or place.link.heard < late)
