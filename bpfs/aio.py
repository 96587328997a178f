# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of `bpfs.client` that wait, for asyncio: moves, ends of processes, commands on nodes, events.

::

    cluster = AsyncCluster()
    await cluster.migrate(1234, 7)
    print(await cluster.wait(1234))
    async for result in cluster.run(["hostname"], nodes="allup"):
        print(result.node, result.stdout)

What does not wait (states, loads, lists) is a read of a small file: use `cluster.sync`, the plain `Cluster`. Each call
runs in a thread: a file below /bpfs cannot be polled.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, TypeVar

from bpfs.client import Cluster, Event, ExitStatus, Result

T = TypeVar("T")

_END = object()


class AsyncCluster:
    """A cluster for asyncio. Arguments and errors as for `Cluster`."""

    def __init__(self, mount: str | os.PathLike[str] | None = None) -> None:
        self.sync = Cluster(mount)

    async def migrate(self, pid: int, node: int) -> None:
        """As `Node.migrate`. When it is cancelled the move goes on."""
        await asyncio.to_thread(self.sync.nodes[node].migrate, pid)

    async def wait(self, pid: int) -> ExitStatus:
        """As `Process.wait`."""
        return await _in_thread(self.sync.procs[pid].wait)

    async def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        nodes: str = "allup",
        *,
        stdin: bytes = b"",
        fanout: int = 64,
        timeout: float | None = None,
    ) -> AsyncIterator[Result]:
        """As `Cluster.run`."""
        results = self.sync.run(argv, nodes, stdin=stdin, fanout=fanout, timeout=timeout)
        async for result in _follow(results):
            yield result

    async def events(self) -> AsyncIterator[Event]:
        """As `Cluster.events`."""
        async for event in _follow(self.sync.events()):
            yield event


async def _in_thread(call: Callable[[], T]) -> T:
    # A thread of its own, and a daemon: a call that waits for ever must not keep the pool or the program.
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(way: Callable[[Any], None], what: Any) -> None:
        if not future.done():
            way(what)

    def work() -> None:
        try:
            result = call()
        except BaseException as error:
            _call_soon(loop, tell, future.set_exception, error)
        else:
            _call_soon(loop, tell, future.set_result, result)

    threading.Thread(target=work, daemon=True).start()
    return await future


async def _follow(items: Iterator[T]) -> AsyncIterator[T]:
    loop = asyncio.get_running_loop()
    ready: asyncio.Queue[Any] = asyncio.Queue()

    def work() -> None:
        end: Any = _END
        try:
            for item in items:
                _call_soon(loop, ready.put_nowait, (item,))
        except BaseException as error:
            end = error
        _call_soon(loop, ready.put_nowait, end)

    threading.Thread(target=work, daemon=True).start()
    while True:
        got = await ready.get()
        if got is _END:
            return
        if isinstance(got, BaseException):
            raise got
        yield got[0]


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: object) -> None:
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        pass  # the loop has ended, and with it whoever wanted to know
