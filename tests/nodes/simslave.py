"""Slaves that speak the real protocol and have no jobs, and a master without a mount, both in this very process."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from bpfs.config import Config
from bpfs.engines import Workers
from bpfs.master.cluster import Cluster
from bpfs.master.listener import Listener, open_port
from bpfs.slave.images import Images
from bpfs.wire import handshake, streams
from bpfs.wire.link import Link
from bpfs.wire.messages import (
    ClockIs,
    Done,
    DropImage,
    Fence,
    Heartbeat,
    HeartbeatSeen,
    HoldImage,
    Join,
    Leaving,
    Message,
    Names,
    ReadClock,
    Ready,
    Sample,
    SetClock,
    SlewClock,
    Welcome,
)

KEY = b"0123456789abcdef" * 2
SAMPLE = Sample(
    "0.10 0.20 0.30 1/100 1234", (("MemTotal", 1 << 20), ("MemFree", 1 << 19)), 2, 1000.0, "6.1.0", 2400.0,
    ((0, 10, 1, 5, 84, 0, 0, 0, 0, 0, 0), (1, 20, 2, 8, 70, 0, 0, 0, 0, 0, 0)), (0.16, 0.3),
    (("ctxt", 77), ("btime", 1000)),
)  # fmt: skip

ANSWERS: dict[type[Message], Any] = {
    Names: lambda _: None,
    ReadClock: lambda _: ClockIs(time.time_ns()),
    SlewClock: lambda _: None,
    SetClock: lambda _: None,
}
"""Handlers for what a master wants of every node."""


class NoZygote:
    """There is no engine in these tests."""

    def worker(self) -> socket.socket:
        raise OSError("no engine here")


@dataclass
class Master:
    """A cluster and its port."""

    cluster: Cluster
    port: int

    def state(self, number: int) -> str:
        return self.cluster.nodes.get(number).state.value

    async def wait_state(self, number: int, state: str) -> None:
        """Waits until the node exists and is in that state."""
        while True:
            node = self.cluster.nodes.find(number)
            if node is not None and node.state.value == state:
                return
            await self.cluster.events.wait_change()


@asynccontextmanager
async def master(at: int = 0, key: bytes = KEY, **settings: object) -> AsyncIterator[Master]:
    """A master at this port, or a free one; `settings` go into its configuration."""
    config = Config(address="127.0.0.1", port=0, key=Path("/nowhere"), **settings)  # type: ignore[arg-type]
    with open_port("127.0.0.1", at) as sock:
        async with trio.open_nursery() as nursery:
            cluster = Cluster(config, key, Workers(NoZygote()), nursery)
            cluster.reconfigure(config)
            nursery.start_soon(Listener(cluster, sock).run)
            yield Master(cluster, sock.getsockname()[1])
            nursery.cancel_scope.cancel()


@dataclass
class SimulatedSlave:
    """One slave; `run` is one connection of it."""

    port: int
    number: int | None = None
    hostname: str = "sim"
    macs: tuple[str, ...] = ()
    key: bytes = KEY
    machine: bytes = field(default_factory=lambda: os.urandom(16))
    facts: bytes = b""
    arch: str = field(default_factory=lambda: os.uname().machine)
    obeys: bool = True  # answers a fence
    beats: bool = True  # sends heartbeats
    ready: bool = True  # says that it is ready
    real: bool = False
    keeps: bool = False  # images, for jobs and for other nodes
    door: int | None = None  # where these are told to ask for them; None: where they are
    host: str = "127.0.0.1"  # of the master
    handlers: dict[type[Message], Any] = field(default_factory=dict)  # for what else it answers
    heard: list[Message] = field(default_factory=list)
    link: Link | None = None
    images: Images | None = None
    welcome: Welcome | None = None

    async def run(self, sample: Sample | None = None) -> str:
        """Connects and is a node until the link ends, and gives the reason.

        Raises:
            RefusedByMaster, ProtocolError, LinkClosed: as the handshake does.
        """
        link = self.link = Link(await streams.connect(self.host, self.port), "master")
        join = Join(b"", self.number, self.macs, self.hostname, "6.1.0", self.machine, self.real, self.facts, self.arch)
        try:
            self.welcome = await handshake.enter(link, self.key, join)
            async with trio.open_nursery() as nursery:
                door = await self._open_door(link, nursery) if self.keeps else 0
                if self.ready:
                    link.notify_nowait(Ready(1, False, door))
                if sample is not None:
                    link.notify_nowait(sample)
                nursery.start_soon(self._beat, link, self.welcome.heartbeat)
                reason = await link.run({Fence: self._fence, HeartbeatSeen: self.heard.append} | self.handlers)
                nursery.cancel_scope.cancel()
            return reason
        finally:
            link.close("simulated end")

    async def _open_door(self, link: Link, nursery: trio.Nursery) -> int:
        images = self.images = Images(link)
        self.handlers |= {HoldImage: images.hold, DropImage: images.drop}
        door = await images.open(nursery)
        return door if self.door is None else self.door

    async def _beat(self, link: Link, pause: float) -> None:
        count = 0
        while self.beats and not link.reason:
            count += 1
            link.notify_nowait(Heartbeat(count))
            await trio.sleep(pause)

    async def _fence(self, message: Fence) -> Done:
        self.heard.append(message)
        if not self.obeys:
            await trio.sleep_forever()
        return Done()

    def leave(self) -> None:
        """Says good-bye."""
        assert self.link is not None
        self.link.notify_nowait(Leaving("the slave was ended"))
        self.link.close("left")
