"""The end of a copy on a node that the process leaves, and what has become of one whose engine says nothing."""

from __future__ import annotations

import errno
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from bpfs import log
from bpfs.errors import BpfsError, EngineRefused
from bpfs.procs.migration import Migration
from bpfs.procs.places import Engine, NodePlace
from bpfs.procs.process import Process
from bpfs.wire import messages

ENGINES = 4  # that are tried

_log = log.get("procs")


async def vanish(migration: Migration, src: Engine, go: bool) -> None:
    """Ends the frozen copy on a node, or has it stand for itself where relatives need that.

    Where the node is lost just then, waits until the copy cannot be alive.

    Raises:
        BpfsError: the worker died before it did anything: the kernel let the copy run on.
    """
    proc, place = migration.proc, migration.source
    assert isinstance(place, NodePlace)
    proc.leaving = True
    try:
        if not proc.source_lost:
            await _kill_copy(migration, place, src, go)
    except BpfsError as error:
        if error.code != errno.EHOSTDOWN:
            raise
        if not await _has_gone_since(proc, place, error):
            if migration.company is None:
                proc.doom = proc.doom or proc.unclaimed
                raise
            await _end_copy(migration, NodePlace(place.node))
    finally:
        proc.leaving = False


async def _kill_copy(migration: Migration, place: NodePlace, src: Engine, go: bool) -> None:
    proc, company = migration.proc, migration.company
    leaving: dict[str, Any] = {"init": place.node.init, "leaving": migration.along}
    try:
        await src.call("vanish", go=go, **leaving)
    except BpfsError as error:
        # EIO: the worker has died, maybe between the kill and its word. What has become of the copy decides.
        if error.code == errno.EHOSTDOWN or (company is None and error.code != errno.EIO):
            raise
        if company is not None and isinstance(error, EngineRefused):
            await src.call("vanish", **leaving)  # its copy has died, but all have agreed
        elif await _runs(proc, place):
            if company is None:
                raise
            await _end_copy(migration, place)
        _log.warning("process %d: its copy on node %d is gone, and so is the worker", proc.pid, place.number)


async def _end_copy(migration: Migration, place: NodePlace) -> None:
    """All have agreed: it stands still, and ends by another's hand."""

    async def end(engine: Engine) -> None:
        await engine.call("freeze", pid=await place.hostpid(migration.proc))
        await engine.call("inspect", **migration.looking)
        await engine.call("vanish", init=place.node.init, leaving=migration.along)

    await _have(place, end)


async def _have(place: NodePlace, work: Callable[[Engine], Awaitable[None]]) -> None:
    """Has an engine that lives do something. Raises BpfsError: what it says; EIO, all that were tried have died."""
    for left in reversed(range(ENGINES)):
        try:
            async with place.engine() as engine:
                await work(engine)
                return
        except BpfsError as error:
            # What has killed one engine may have killed those that waited for work, too: that says nothing.
            if isinstance(error, EngineRefused) or error.code != errno.EIO or not left:
                raise


async def _has_gone_since(proc: Process, place: NodePlace, error: BpfsError) -> bool:
    """Whether the link was lost after the copy was killed, or no copy can be alive by now. One that ended by itself has
    run on before."""
    _log.warning("process %d: waiting until node %d is back, or fenced: %s", proc.pid, place.number, error)
    if await place.outlives(proc.pid):
        proc.hostpid = 0
        return False
    return proc.unclaimed is None or proc.unclaimed.signal == signal.SIGKILL


def vanishing(migration: Migration) -> dict[str, Any]:
    """What `send` is told of that. The copy's end is nobody's business from now on."""
    assert isinstance(migration.source, NodePlace)
    migration.proc.leaving = True
    return {"depart": "vanish", "init": migration.source.node.init}


async def has_vanished(migration: Migration, error: BpfsError | None, whole: bool) -> bool:
    """Whether the copy on a node is gone, or cannot be alive any more, though its worker said this, or nothing."""
    proc, place = migration.proc, migration.source
    assert isinstance(place, NodePlace)
    if isinstance(error, EngineRefused):
        return False
    try:
        if error is not None and error.code == errno.EHOSTDOWN:
            raise error
        # The worker has died, maybe between the kill and its word. What has become of the copy decides.
        gone = not await _runs(proc, place)
    except BpfsError as lost:
        if lost.code != errno.EHOSTDOWN:
            raise
        return whole and await _has_gone_since(proc, place, lost)
    if gone:
        _log.warning("process %d: its copy on node %d is gone, and so is the worker", proc.pid, place.number)
    return gone


async def _runs(proc: Process, place: NodePlace) -> bool:
    """Whether the copy on a node goes on after its tracer's death: what is being killed can be stopped no more.

    Raises:
        BpfsError: EHOSTDOWN.
    """
    proc.hostpid = 0  # the node is asked for it: another process may have got the number
    with suppress(BpfsError):  # ended; or the node is gone, which is met again below
        reply = await place.link.request(messages.JobStatus(proc.pid, ("status",)), place.link.patience)
        if isinstance(reply, messages.JobStatusIs) and reply.texts[0].startswith(b"Name:\tnodeinit\n"):
            return False  # it stands for itself there

    async def look(engine: Engine) -> None:
        await engine.call("freeze", pid=await place.hostpid(proc))
        await engine.call("release")

    try:
        await _have(place, look)
    except BpfsError as error:
        if error.code == errno.EHOSTDOWN:
            raise
        return error.code != errno.ESRCH
    return True
