"""Post-copy: a process runs at its new place, and its memory comes after it.

Both engines go on with it by themselves (engine/owing.py, engine/filling.py), each between two requests of ours. We
only look how far they are, and tell the destination's when the source is lost: it ends the process then, which cannot
go on without what has not come. Where the destination's own engine dies, its zygote does that (engine/guard.py).
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.procs.places import Engine, Place
from bpfs.procs.process import MASTER, ExitStatus, Process
from bpfs.procs.table import ProcTable

MB = 1 << 20
LOOK = 0.1  # seconds between two looks
VERDICT = 2.0  # seconds for the destination's engine to say why a process has ended

_log = log.get("procs")


class Lazy:
    """The memory that has still to come to one process."""

    def __init__(self, proc: Process, owed: int, source: Place, src: Engine, dst: Engine, engines: AsyncExitStack):
        """Args:
        owed: bytes, about.
        engines: holds both, and is ours from now on.
        """
        self._proc, self._owed, self._from = proc, owed, source.number
        self._src, self._dst, self._engines = src, dst, engines
        self._received = 0
        self._over = trio.Event()
        proc.owed = self

    @property
    def progress(self) -> str:
        """How far it is, in words."""
        return f"{max(self._owed - self._received, 0) // MB} of {-(-self._owed // MB)} MB to come"

    async def wait_whole(self) -> None:
        """Waits until all is there, or the process has ended."""
        await self._over.wait()

    async def settle(self) -> None:
        """The process has ended: finds out whether that was because of this, and says so in its `why`."""
        with trio.move_on_after(VERDICT):
            await self._look()

    async def run(self, table: ProcTable) -> None:
        """Looks after it until all is there, or is not needed any more, or cannot come."""
        proc = self._proc
        try:
            async with self._engines, trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_source)
                while not await self._look():
                    await trio.sleep(LOOK)
                nursery.cancel_scope.cancel()
            if not proc.why:
                proc.history[-1] = replace(proc.history[-1], bytes=proc.history[-1].bytes + self._received)
                table.changed(proc, "has all of its memory")
            elif proc.place == MASTER:  # at home nobody else reports its end
                table.end(proc, ExitStatus(signal=signal.SIGKILL))
        finally:
            proc.owed = None
            self._over.set()

    async def _look(self) -> bool:
        """Whether it is over."""
        try:
            reply = await self._dst.call("filled")
        except BpfsError as error:
            self._has_failed(error.sentence)
            return True
        return self._take(reply)

    def _take(self, reply: dict[str, Any]) -> bool:
        self._received = int(reply["received"])
        if reply["failed"]:
            self._has_failed(str(reply["failed"]))
        return bool(reply["over"])

    def _has_failed(self, reason: str) -> None:
        if not self._proc.why:
            where = "the master" if self._from == MASTER else f"node {self._from}"
            self._proc.why = f"its memory was lost on the way from {where}, {self.progress}: {reason}"
            _log.warning("process %d: %s", self._proc.pid, self._proc.why)

    async def _watch_source(self) -> None:
        while True:
            try:
                await self._src.call("owing")
            except BpfsError as error:
                try:
                    self._take(await self._dst.call("give_up", why=error.sentence))
                except BpfsError as other:
                    self._has_failed(other.sentence)
                return
            await trio.sleep(LOOK)


Keep = Callable[[Lazy], None]
"""Looks after it from now on, in the background."""
