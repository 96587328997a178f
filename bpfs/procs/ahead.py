"""A large process's memory goes ahead of it, in rounds, while it runs on: engine/precopy.py."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.procs import faults
from bpfs.procs.exchange import transfer
from bpfs.procs.phases import Phase
from bpfs.procs.places import Engine
from bpfs.procs.process import ProcState

if TYPE_CHECKING:
    from bpfs.procs.migration import Migration

MB = 1 << 20
SLICE = 0.2  # seconds of copying ahead between two reports
SILENCE = 60.0  # seconds without any memory after which the destination gives up

_log = log.get("procs")


async def copy_ahead(move: Migration, src: Engine, dst: Engine) -> None:
    """Sends memory until the rest is small, or the process writes faster than that. Raises BpfsError."""
    async with _at_large(move):
        landing, where = await move.stage(dst)
        move.watched = True
        reply = await src.call(
            "watch", pid=await move.source.hostpid(move.proc), host=landing.host, port=landing.port,
            token=landing.token, pack=move.packs, **move.looking,
        )  # fmt: skip
        if not reply["watched"]:
            _log.info("process %d is copied while it stands still: %s", move.proc.pid, reply["why"])
            return
        await transfer(lambda: _rounds(move, src), lambda: dst.call("stage", timeout_s=SILENCE, **where), move.figures)
        move.ahead = True


async def _rounds(move: Migration, src: Engine) -> dict[str, Any]:
    while True:
        at = await src.call("copy", seconds=SLICE)
        move.proc.copying = f"round {at['round']}, {at['sent'] // MB} of {-(-at['size'] // MB)} MB"
        await faults.hold(Phase.PRECOPY.value)
        if at["done"]:
            return {"bytes": at["total"]}


@asynccontextmanager
async def _at_large(move: Migration) -> AsyncIterator[None]:
    """The process runs on in this context: nothing is kept back from it, whatever happens to it counts at once."""
    proc = move.proc
    proc.state, proc.busy, proc.copying = move.before, f"it moves to node {move.destination.number}", "round 1"
    await move.calm.aclose()
    try:
        yield
    finally:
        proc.busy = proc.copying = ""
        if proc.state in (ProcState.RUNNING, ProcState.STOPPED):
            move.before, proc.state = proc.state, ProcState.MIGRATING
    await move.calm.enter_async_context(move.quiet())
    if proc.state is not ProcState.MIGRATING or proc.source_lost:
        raise BpfsError(errno.ESRCH, f"process {proc.pid} ended on the way")
