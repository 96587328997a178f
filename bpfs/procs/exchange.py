"""Engines at work on one thing at once, and whose error counts."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import trio

from bpfs.errors import BpfsError
from bpfs.procs.phases import Figures

CONNECTION_ERRORS = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE)
LAST_WORD = 0.5  # seconds that a destination gets to say why, when the source has failed
LAST_WAIT = 6.0  # the same, where the source's node was lost: it waits for a word of that for 5 s

A = TypeVar("A")
B = TypeVar("B")


def refuse(refusals: list[str]) -> None:
    """Raises BpfsError EOPNOTSUPP with all the obstacles, where there are any."""
    if refusals:
        raise BpfsError(errno.EOPNOTSUPP, "; ".join(refusals))


async def both(
    first: Callable[[], Awaitable[A]], second: Callable[[], Awaitable[B]]
) -> tuple[A | BpfsError, B | BpfsError]:
    """Runs both at once, to the end of both. Returns what each gives, or its error."""
    results: dict[int, Any] = {}

    async def one(index: int, work: Callable[[], Awaitable[Any]]) -> None:
        try:
            results[index] = await work()
        except BpfsError as error:
            results[index] = error

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, 0, first)
        await one(1, second)
    return results[0], results[1]


async def together(first: Callable[[], Awaitable[A]], second: Callable[[], Awaitable[B]]) -> tuple[A, B]:
    """Runs both at once, to the end of both: an engine must not be left in the middle of a call.

    Raises:
        BpfsError: that of `second`, else that of `first`: the source knows best why a process cannot move.
    """
    one, other = await both(first, second)
    if isinstance(other, BpfsError):
        raise other
    if isinstance(one, BpfsError):
        raise one
    return one, other


async def all_of(works: Iterable[Callable[[], Awaitable[A]]]) -> list[A]:
    """Runs all at once, to the end of all. Returns what they give, in their order.

    Raises:
        BpfsError: that of the first that failed, in their order.
    """
    works = list(works)
    results: dict[int, A] = {}
    errors: dict[int, BpfsError] = {}

    async def one(index: int, work: Callable[[], Awaitable[A]]) -> None:
        try:
            results[index] = await work()
        except BpfsError as error:
            errors[index] = error

    async with trio.open_nursery() as nursery:
        for index, work in enumerate(works):
            nursery.start_soon(one, index, work)
    if errors:
        raise errors[min(errors)]
    return [results[index] for index in range(len(works))]


async def transfer(
    send: Callable[[], Awaitable[dict[str, Any]]], receive: Callable[[], Awaitable[dict[str, Any]]], figures: Figures
) -> None:
    """Sends and receives at once.

    Where one side fails the other may never hear of it and is not waited for; but where only the connection
    failed, the destination says a moment later why.

    Raises:
        BpfsError: the source's, which knows what the destination said; else the destination's.
    """
    errors: dict[str, BpfsError] = {}
    source_scope, scope = trio.CancelScope(), trio.CancelScope()

    async def sending() -> None:
        with source_scope:
            try:
                reply = await send()
                figures.bytes += int(reply["bytes"])
                figures.stood_for = float(reply.get("stood_for", 0.0))
            except BpfsError as error:
                errors["source"] = error
                scope.deadline = trio.current_time() + (LAST_WAIT if error.code == errno.EHOSTDOWN else LAST_WORD)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sending)
        with scope:
            try:
                await receive()
            except BpfsError as error:
                errors["destination"] = error
                source_scope.deadline = trio.current_time() + LAST_WORD
    source = errors.get("source")
    if source is not None and not (source.code in CONNECTION_ERRORS and "destination" in errors):
        raise source
    if errors:
        raise errors["destination"]
