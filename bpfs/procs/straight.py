"""The rest of a move, once its process stands still, where the engines need no word of the master in between."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import trio

from bpfs.errors import BpfsError
from bpfs.procs.exchange import transfer
from bpfs.procs.phases import Landing
from bpfs.procs.places import Engine

if TYPE_CHECKING:
    from bpfs.procs.migration import Migration


async def go_straight(move: Migration, src: Engine, dst: Engine, landing: Landing) -> dict[str, Any] | None:
    """Transfer, departure and resume: stdio is held still, and then the source may end when the copy is whole.

    Returns, raises:
        As `Migration._hand_over`.
    """
    may_depart = left = False
    heard: BpfsError | None = None
    arrived: list[dict[str, Any]] = []

    async def send() -> dict[str, Any]:
        nonlocal may_depart, left, heard
        await move.hold()
        move.check_alive()
        may_depart = True
        try:
            reply = await move.send(src, landing, go=True, **move.departure())
        except BpfsError as error:
            heard = error
            raise
        left = True
        with trio.CancelScope(shield=True):  # the copy may run already
            await move.departed()
        return reply

    async def follow() -> dict[str, Any]:
        reply = await move.follow(dst, landing)
        if reply["running"]:
            move.figures.running = time.perf_counter() - reply["running_for"]
        arrived.append(reply)
        return reply

    try:
        await transfer(send, follow, move.figures)
    except BpfsError:
        if not left:
            runs = bool(arrived) and arrived[0]["running"]
            if not may_depart or not (runs or await move.has_departed(heard, bool(arrived))):
                move.proc.doom = move.proc.doom or move.proc.unclaimed
                raise
            await move.departed()  # its engine died right after
    finally:
        move.proc.leaving, move.proc.unclaimed = False, None
    if arrived and arrived[0]["running"]:
        return arrived[0]
    return None
