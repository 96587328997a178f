"""A small process leaves without a word of the master between its freeze, or its image, and its first step there."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Any

import trio

from bpfs.errors import BpfsError, EngineRefused
from bpfs.procs.exchange import refuse, transfer
from bpfs.procs.phases import Landing, Surprise
from bpfs.procs.places import Engine

if TYPE_CHECKING:
    from bpfs.procs.migration import Migration


async def go_straight(move: Migration, src: Engine, dst: Engine, landing: Landing) -> dict[str, Any] | None:
    """Transfer, departure and resume, with no word of ours in between; the freeze as well, where it has not been.

    Returns, raises:
        As `Migration._hand_over`.
    """
    left: list[bool] = []
    heard: list[bool] = []
    arrived: list[dict[str, Any]] = []

    async def send() -> dict[str, Any]:
        try:
            reply = await _send(move, src, landing)
        except EngineRefused:
            heard.append(True)
            raise
        heard.append(True)
        _check(move, reply)
        left.append(True)
        with trio.CancelScope(shield=True):  # the copy may run already
            await move.departed()
        return reply

    async def receive() -> dict[str, Any]:
        reply = await move.receive(dst, landing, follow=True)
        move.figures.running = time.perf_counter() - reply.get("running_for", 0.0)
        arrived.append(reply)
        return reply

    try:
        await transfer(send, receive, move.figures)
    except BpfsError:
        if not left:
            if not (arrived and arrived[0]["running"]) and not await move.has_departed(bool(heard)):
                raise
            await move.departed()  # the source's engine died right after
    if arrived and arrived[0]["running"]:
        return arrived[0]
    move.figures.running = 0.0
    return None


async def _send(move: Migration, src: Engine, landing: Landing) -> dict[str, Any]:
    if move.figures.frozen:
        return await move.send(src, landing, **move.departure())
    move.figures.frozen = time.perf_counter()
    return await move.send(
        src, landing, "straight", pid=await move.source.hostpid(move.proc), expected=move.looked, **move.looking,
        **move.departure(),
    )  # fmt: skip


def _check(move: Migration, reply: dict[str, Any]) -> None:
    """Whether it has gone indeed. Raises BpfsError."""
    move.figures.frozen = reply.get("frozen_at", move.figures.frozen)
    refuse(reply.get("refusals", []))
    if reply.get("surprise"):
        raise Surprise(errno.EAGAIN, f"process {move.proc.pid} has changed since it was looked at")
