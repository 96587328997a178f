"""The rest of a move, once its process stands still, where the engines need no word of the master in between."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.procs.exchange import refuse, transfer
from bpfs.procs.phases import Landing
from bpfs.procs.places import Engine

if TYPE_CHECKING:
    from bpfs.procs.migration import Migration, Stop

_log = log.get("procs")


class Surprise(BpfsError):
    """The process stands still, and is not what all was made ready for."""

    def __init__(self, pid: int, summary: dict[str, Any]) -> None:
        super().__init__(errno.EAGAIN, f"process {pid} has changed since it was looked at")
        self.summary = summary


async def go_straight(
    move: Migration, src: Engine, dst: Engine, landing: Landing, stop: Stop | None = None
) -> dict[str, Any] | None:
    """Transfer, departure and resume: the source ends when its copy is whole.

    Args:
        stop: the process runs still, and all is ready for it: it is stopped now, and goes if it is what was foreseen.

    Returns, raises:
        As `Migration._hand_over`.
    """
    if stop is None:
        return await _Going(move, src, dst, landing).go(None)
    try:
        return await _Going(move, src, dst, landing).go(stop)
    except Surprise as surprise:
        _log.info("process %d: once more, as it is: %s", move.proc.pid, surprise)
        anew = await move.land_anew(dst, surprise.summary)
        return await _Going(move, src, dst, anew).go(None)


class _Going:
    """One attempt."""

    def __init__(self, move: Migration, src: Engine, dst: Engine, landing: Landing) -> None:
        self._move, self._src, self._dst, self._landing = move, src, dst, landing
        self._may_depart = self._left = False
        self._heard: BpfsError | None = None  # from the source's engine
        self._arrived: dict[str, Any] | None = None

    async def go(self, stop: Stop | None) -> dict[str, Any] | None:
        move = self._move
        try:
            await transfer(lambda: self._send(stop), self._follow, move.figures)
        except BpfsError:
            if not self._left:
                if not self._may_depart or not await self._has_departed():
                    move.proc.doom = move.proc.doom or move.proc.unclaimed
                    raise
                await move.departed()  # its engine died right after
        finally:
            move.proc.leaving, move.proc.unclaimed = False, None
        return self._arrived if self._runs else None

    @property
    def _runs(self) -> bool:
        return self._arrived is not None and bool(self._arrived["running"])

    async def _has_departed(self) -> bool:
        return self._runs or await self._move.has_departed(self._heard, self._arrived is not None)

    async def _send(self, stop: Stop | None) -> dict[str, Any]:
        move = self._move
        if stop is not None and move.goes_at_once:
            return await self._depart(partial(stop, expected=move.looked))
        if stop is not None:
            self._check(await stop(expected=move.looked))
        await move.hold()
        return await self._depart(partial(move.send, self._src, self._landing))

    async def _depart(self, by: Callable[..., Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        move = self._move
        move.check_alive()
        self._may_depart = True
        try:
            reply = await by(go=True, **move.departure())
        except BpfsError as error:
            self._heard = error
            raise
        if "stood_for" not in reply:
            self._may_depart = False
            self._check(reply)
        self._left = True
        with trio.CancelScope(shield=True):  # the copy may run already
            await move.departed()
        return reply

    def _check(self, reply: dict[str, Any]) -> None:
        """Raises BpfsError where the source has not gone ahead."""
        refuse(reply["refusals"])
        if not reply.get("agreed"):
            raise Surprise(self._move.proc.pid, reply)

    async def _follow(self) -> dict[str, Any]:
        self._arrived = await self._move.receive(self._dst, self._landing, follow=True)
        return self._arrived
