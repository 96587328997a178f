"""A migration, phase by phase.

The promise: at every instant at most one copy of the process runs, and after any single failure exactly one
does; or, where the node that holds it died, its ghost ends as if killed. The order of things keeps it:

* up to HELD the source is frozen and whole; whatever fails, it is released as it was;
* the destination's copy is resumed only when the source is known to be gone: exec'd into the ghost, killed on
  its node, or fenced together with its node;
* who says so is the source's engine itself, to the destination's, on the connection on which the image went ("go"):
  it has just seen the exec, or the end. Where it cannot (it died, the connection broke, a fence was waited for), the
  master says it, once it knows; the destination takes the first word that comes, and there is none after it. An engine
  that failed to end its source never says it; where one dies after its word, the destination's answer tells;
* an image is on its way as soon as its process stands still, if it is known where it goes; and where a process is
  small, neither engine asks the master between the image and the copy's first step, nor, where it still is what all
  was made ready for, between its freeze and that (straight.py): the source ends it when the destination says that its
  copy is whole;
* who closes an engine undoes what that engine has begun, so leaving its context in any way is safe.

What differs between the directions is in `leave.py`, `hop.py` and `homecoming.py`.

A large process's memory goes ahead in rounds (ahead.py, engine/precopy.py) while it runs on and nothing has been
decided: its signals, stops, forks and its end are dealt with as if nothing moved it.
"""

from __future__ import annotations

import errno
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.procs import faults
from bpfs.procs.ahead import copy_ahead
from bpfs.procs.company import Company
from bpfs.procs.exchange import refuse, together, transfer
from bpfs.procs.lazy import Keep, Lazy
from bpfs.procs.phases import Figures, Landing, Phase, is_watched_closely
from bpfs.procs.places import Engine, Place
from bpfs.procs.process import ExitStatus, Process, ProcState
from bpfs.procs.straight import go_straight
from bpfs.tree.base import WriteRequest
from engine.facts import share_files, unlike, unpacks

UNDO_TIMEOUT = 10.0  # seconds that an engine gets to undo its part before its socket is simply closed
FRESH = 0.002  # seconds after the destination said that its copy is whole within which it need not be asked again
STRAIGHT = 32 << 20  # bytes of an image that are on their way before anybody can think better of it
RECEIVE_TIMEOUT = 15.0  # seconds that the destination waits for the source to connect, and for each piece

_log = log.get("procs")

Externals = list[dict[str, Any]]
"""Open files that only a relay can carry: engine/descriptors/external.py."""

Look = Callable[[], Awaitable[Externals | None]]
"""What a process has of them, or, while it runs, will most likely have once it stands still; None: cannot be told."""

Stop = Callable[..., Awaitable[dict[str, Any]]]
"""Has the process stand still; gives what the engine's `inspect` says of it, which is told the keyword arguments."""

Release = Callable[[BpfsError], Awaitable[object]]
"""Lets a stopped source go on (or end) because of this error."""


@dataclass(slots=True)
class Seen:
    """A process that stands still with others, and has been looked at.

    Attributes:
        since: when the first of them was stopped, by time.perf_counter().
        summary: what the source's engine said.
        dst: an engine of the destination.
    """

    since: float
    summary: dict[str, Any]
    dst: Engine


class Migration(ABC):
    """One move of one process from where it is to another place."""

    def __init__(self, proc: Process, source: Place, destination: Place) -> None:
        self.proc = proc
        self.source = source
        self.destination = destination
        self.figures = Figures(time.perf_counter())
        # What the source's engine is told for its look.
        self.looking: dict[str, Any] = {"moving": True, "family": True}
        if differences := unlike(source.facts, destination.facts):
            self.looking["unlike"] = differences
        if not share_files(source.facts, destination.facts):
            self.looking["digests"] = True
        self.on_failure: Callable[[BpfsError], None] | None = None  # called once, before the source runs on
        self.precopy: int | None = None  # bytes of memory from which on it goes ahead; None: never
        self.wants_strict = proc.wants_strict
        self.before = proc.state
        self.compress = False  # pages may be packed, where that is faster
        self.ahead = False  # the destination has memory that went ahead
        self.watched = False  # the source's engine may hold its record of writes
        self.calm = AsyncExitStack()  # has `quiet`
        self._scope: trio.CancelScope | None = None  # of all that can be called off
        self.company: Company | None = None  # of those with which it moves, or stays
        self.borrowed: dict[int, int] = {}  # key of an external -> that of what another's ghost has for it
        self.landing: Landing | None = None  # where the image goes, as soon as that is known
        self.looked: dict[str, Any] = {}  # what the source's engine said of it while it ran
        self.front = 0  # the group that it has put in front of its terminal where it is; 0: that is known here
        self._agreed = False  # the engines know what they may do if it still is that
        self.own = 0  # bytes of memory that it had then
        self.mapped: list[Any] = []  # files that it mapped then
        self.lacking: list[Any] = []  # those of them that the destination does not have, and cannot fetch
        self.keep: Keep | None = None  # what can of its memory comes after it, and is looked after so
        self.owed = 0  # bytes that do

    def be_lazy(self, keep: Keep) -> None:
        """What can of its memory comes when the process runs at its new place; `keep` sees to it then."""
        self.keep, self.precopy, self.looking["lazy"] = keep, None, True

    @property
    def before(self) -> ProcState:
        """What it does when no move owns it."""
        return self.proc.before

    @before.setter
    def before(self, state: ProcState) -> None:
        self.proc.before = state

    @property
    def along(self) -> Sequence[int]:
        """The pids of those that move with it."""
        return self.company.pids if self.company is not None else ()

    def fail(self, error: BpfsError) -> None:
        """The move is off because of this error."""
        self.proc.landing = True
        told, self.on_failure = self.on_failure, None
        if told is not None:
            told(error)

    async def run(self, writer: WriteRequest | None) -> None:
        """Moves the process. `writer` is given where it waits in the write that asked for the move.

        Raises:
            BpfsError: the process runs on where it was, or ended with the place that held it.
        """
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.calm)
            await self.calm.enter_async_context(self.quiet())
            engines = await stack.enter_async_context(AsyncExitStack())
            src = await engines.enter_async_context(self.source.engine())
            dst = await engines.enter_async_context(self.destination.engine())

            async def release(error: BpfsError) -> None:
                if self.watched and not self.figures.frozen:
                    await src.call("unwatch")
                if self.figures.frozen:
                    await src.call("release", errno=error.code if writer is not None and writer.answered else 0)

            async def stop(**agreed: Any) -> dict[str, Any]:
                return await self._freeze(src, writer, agreed)

            await self._move(src, dst, lambda: self._look(src), stop, release)
            if self.owed and self.keep is not None:
                self.keep(Lazy(self.proc, self.owed, self.source, src, dst, engines.pop_all()))

    async def run_stopped(
        self, src: Engine, release: Release, ready: Engine | None = None, seen: Seen | None = None
    ) -> None:
        """Moves a process that `src` has stopped already; `release` undoes that where the move fails.

        Args:
            ready: the destination's engine where `make_ready` has been done with it; else it is done now.
            seen: where it has been looked at as well.
        """
        self.figures.began = self.figures.frozen = seen.since if seen is not None else time.perf_counter()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.quiet())
            dst = ready or (seen.dst if seen is not None else None)
            if dst is None:
                dst = await stack.enter_async_context(self.destination.engine())
            summary: dict[str, Any] = {}

            async def stop(**_: Any) -> dict[str, Any]:
                if not summary:
                    found = seen.summary if seen is not None else await src.call("inspect", **self.looking)
                    summary.update(await self._inspected(found))
                return summary

            async def look() -> Externals:
                return list((await stop())["externals"])

            await self._move(src, dst, None if ready else look, stop, release)

    async def _move(self, src: Engine, dst: Engine, look: Look | None, stop: Stop, release: Release) -> None:
        try:
            with trio.CancelScope() as self._scope:
                straight = await self._make(src, dst, look, stop)
            scope, self._scope = self._scope, None
            if scope.cancel_called:
                cancelled = BpfsError(errno.ECANCELED, f"the move of process {self.proc.pid} was cancelled")
                raise (self.company.error if self.company else None) or cancelled
        except BaseException as error:
            known = error if isinstance(error, BpfsError) else BpfsError(errno.EINTR, "the move was called off")
            self.fail(known)
            with trio.CancelScope(shield=True):
                await self._undo(release(known), dst)
            raise
        with trio.CancelScope(shield=True):
            await self._commit(src, dst, release, straight, stop)

    def cancel(self) -> bool:
        """Calls the move off. Returns False where it is too late for that."""
        if self._scope is None or self.proc.landing:
            return False
        self._scope.cancel()
        return True

    # -- what a route adds -------------------------------------------------------------------------------------

    def quiet(self) -> AbstractAsyncContextManager[object]:
        """Keeps signals back that would meet the process half-way."""
        return nullcontext()

    def stands_still(self, summary: dict[str, Any]) -> None:
        """It does so before anything is made ready, as one of several that move together."""
        return

    @abstractmethod
    async def make_ready(self, dst: Engine, look: Look) -> None:
        """Does what needs no process that stands still; `landing` is known then."""

    def foresees(self) -> bool:
        """Whether all is ready for a process that still is, once it stands still, what it has been `looked` at."""
        return False

    @abstractmethod
    async def stage(self, dst: Engine) -> tuple[Landing, dict[str, Any]]:
        """Has the destination listen for memory that comes ahead; what its operation `stage` is told."""

    @abstractmethod
    async def land(self, dst: Engine, summary: dict[str, Any]) -> Landing:
        """The source stands still; afterwards the destination is ready to receive it as it really is."""

    async def land_anew(self, dst: Engine, summary: dict[str, Any]) -> Landing:
        """As `land`, where it is not what was foreseen, and the destination has given up what it had made ready."""
        return await self.land(dst, summary)

    async def hold(self) -> None:
        """Holds stdio still, while the image is on its way."""
        return

    goes_straight = True  # the engines may do without the master from the image on

    goes_at_once = False  # and from the freeze on: its stdio need not be held still

    gathers = False  # the destination fetches what the process maps

    ghost_environment: Sequence[bytes] = ()  # of the ghost, where the source's engine makes one

    def ghost_fds(self) -> list[int]:
        """Descriptors of which the source's engine makes the ghost, where it does."""
        return []

    @abstractmethod
    def departure(self) -> dict[str, Any]:
        """What `send` is told of the end of the source, where it goes straight; it may come any time from now on."""

    @abstractmethod
    async def has_departed(self, error: BpfsError | None, whole: bool) -> bool:
        """Whether the source, which may depart by itself, has ended, or cannot be alive any more.

        Args:
            error: of its engine; None: that has not been heard.
            whole: the destination's engine says that it holds a whole copy.
        """

    @abstractmethod
    async def depart(self, src: Engine, go: bool) -> None:
        """Ends the source. Returns only when it is known to be gone.

        Args:
            go: its engine tells the copy that it may run, as soon as that is so.

        Raises:
            BpfsError: it is not known to be gone, and lives, unless it has said otherwise to its copy.
        """

    @abstractmethod
    async def departed(self) -> None:
        """The source is gone: the new place is the place. Comes as early as possible: the copy may run already."""

    @abstractmethod
    async def arrived(self, reply: dict[str, Any]) -> None:
        """The copy runs, as the engine replied: stdio flows to and from its new place."""

    async def found_there(self, error: BpfsError) -> dict[str, Any] | None:
        """The copy's engine said this when it was to run. What it would have said where the copy runs all the same: its
        node was lost, and is back with it; else None."""
        return None

    async def lost(self) -> None:
        """The copy died before it ran: clears up before its ghost ends as killed."""
        return

    @abstractmethod
    async def stay(self) -> None:
        """The move is off, the source runs again: stdio goes on as before."""

    # -- the phases --------------------------------------------------------------------------------------------

    async def _enter(self, phase: Phase) -> None:
        self.proc.progress = f"{phase.value} for node {self.destination.number}"
        await faults.hold(phase.value)

    async def _make(self, src: Engine, dst: Engine, look: Look | None, stop: Stop) -> Landing | None:
        """All that can be called off. Returns where the image is to go, where the engines do the rest by themselves."""
        await self._enter(Phase.PREPARE)
        if look:
            if self.company is not None:
                self.stands_still(await stop())
            await self.make_ready(dst, look)
            if self.lacking:
                await self._carry(src, dst, self.landing)
        if self._may_agree():
            return self.landing
        summary = await stop()
        if "large" in summary:
            await copy_ahead(self, src, dst)
            summary = await stop()
        landing = self.landing = await self.land(dst, summary)
        left = summary["process"]["left" if self.ahead else "bytes"]
        small = left <= STRAIGHT and not is_watched_closely()
        if self.goes_straight and small and not self.company:
            return landing
        await self._enter(Phase.TRANSFER)
        await together(self.hold, lambda: self._transfer(src, dst, landing))
        self.figures.whole = time.perf_counter()
        self.check_alive()
        return None

    async def _carry(self, src: Engine, dst: Engine, landing: Landing | None) -> None:
        """Files that are not there go ahead of the process."""
        assert landing is not None
        where = {"pid": await self.source.hostpid(self.proc), **self._where(landing)}
        await transfer(
            lambda: src.call("give_files", files=self.lacking, **where),
            lambda: dst.call("take_files", files=self.lacking, timeout_s=RECEIVE_TIMEOUT),
            self.figures,
        )

    async def _transfer(self, src: Engine, dst: Engine, landing: Landing) -> None:
        await transfer(lambda: self.send(src, landing), lambda: self.receive(dst, landing), self.figures)

    async def send(self, src: Engine, landing: Landing, **more: Any) -> dict[str, Any]:
        return await src.call(
            "send", self.ghost_fds(), ahead=self.ahead, env=self.ghost_environment, **self._where(landing), **more
        )

    def _where(self, landing: Landing) -> dict[str, Any]:
        return {
            "host": landing.host, "port": landing.port, "token": landing.token, "pack": self.packs, "builds": True
        }  # fmt: skip

    def _there(self) -> dict[str, Any]:
        """What the source's engine is told so that the image goes as soon as the process stands still."""
        if self.landing is None or self.ahead or self.company or is_watched_closely():
            return {}
        return self._where(self.landing)

    @property
    def packs(self) -> bool:
        """Whether pages may be packed on their way."""
        return self.compress and unpacks(self.destination.facts)

    def _may_agree(self) -> bool:
        """Whether the engines may go on after the freeze without us, should the process be what we have `looked` at."""
        if not self.looked or self.landing is None or self.company or is_watched_closely():
            return False
        small = self.keep is not None or self.own <= min(STRAIGHT, self.precopy or STRAIGHT)
        self._agreed = small and self.foresees()
        return self._agreed

    async def receive(self, dst: Engine, landing: Landing, **more: Any) -> dict[str, Any]:
        more |= {"ghost_fds": landing.ghost_fds, "timeout_s": RECEIVE_TIMEOUT, "ahead": self.ahead, "lends": True}
        if self.front:
            more["front"] = self.front
        if self.company is None:
            return await dst.call("receive", landing.fds, externals=landing.externals, **more)
        async with self.company.shared_with(self.proc.pid, self.borrowed) as shared:
            first = len(landing.fds)
            externals = landing.externals | {key: first + index for index, key in enumerate(shared.keys)}
            memory = [[*what, externals[key]] for *what, key in shared.memory]
            return await dst.call("receive", [*landing.fds, *shared.fds], externals=externals, memory=memory, **more)

    # -- what the source's engine is asked ------------------------------------------------------------------------

    async def _look(self, src: Engine) -> Externals | None:
        try:
            pid = await self.source.hostpid(self.proc)
            reply = await src.call("look", pid=pid, outline=True, files=self.gathers, **self.looking)
        except BpfsError:
            return None  # the freeze will meet the obstacle again, and name it
        self.mapped, self.own = reply.get("files", []), int(reply["own"])
        self.looked = {name: reply[name] for name in ("externals", "process")}
        return list(reply["externals"])

    async def _freeze(self, src: Engine, writer: WriteRequest | None, agreed: dict[str, Any]) -> dict[str, Any]:
        await self._enter(Phase.FREEZE)
        hostpid = await self.source.hostpid(self.proc)
        if self.keep is not None:
            await src.call("foresee", pid=hostpid)
        self.figures.frozen = time.perf_counter()
        there = self._there()
        if writer is None:
            limit, self.precopy = None if agreed else self.precopy, None
            reply = await self._ask(src, "freeze", agreed, pid=hostpid, inspect=True, unless=limit, **there)
            if "large" in reply:
                self.figures.frozen = 0.0
                return reply
        else:
            await src.call("freeze", pid=hostpid, writing=True, **there)
            await writer.answer()
            reply = await self._ask(src, "inspect", agreed, **there)
        return reply if agreed else await self._inspected(reply)

    async def _ask(self, src: Engine, op: str, agreed: dict[str, Any], **more: Any) -> dict[str, Any]:
        if "depart" not in agreed:
            return await src.call(op, **more, **self.looking, **agreed)
        return await src.call(op, self.ghost_fds(), env=self.ghost_environment, **more, **self.looking, **agreed)

    async def _inspected(self, summary: dict[str, Any]) -> dict[str, Any]:
        await self._enter(Phase.INSPECT)
        refuse(summary["refusals"])
        return summary

    def check_alive(self) -> None:
        """Raises BpfsError ESRCH where it has ended meanwhile."""
        if self.proc.doom is not None:
            raise BpfsError(errno.ESRCH, f"process {self.proc.pid} ended on the way: {self.proc.doom}")

    async def _commit(self, src: Engine, dst: Engine, release: Release, straight: Landing | None, stop: Stop) -> None:
        self.proc.landing = True
        if not self._agreed:
            await self._enter(Phase.DEPART if straight is None else Phase.TRANSFER)
        try:
            if straight is not None:
                reply = await go_straight(self, src, dst, straight, stop if self._agreed else None)
            else:
                if time.perf_counter() - self.figures.whole > FRESH:
                    await dst.call("hello")  # the other copy must be there up to the moment in which this one goes
                if self.company is not None:
                    self.proc.pledged = True
                    await src.call("pledge")
                    await dst.call("hello")  # nor may the others wait for one that died meanwhile
                    self.check_alive()
                    await self.company.agree()
                    await faults.hold("agreed")
                reply = await self._hand_over(src, dst)
        except BpfsError as error:
            self.fail(error)
            await self._undo(release(error), dst)
            raise
        if reply is None:
            await self._enter(Phase.RESUME)
            try:
                reply = await dst.call("resume")
            except BpfsError as error:
                reply = await self.found_there(error)
                if reply is None:
                    await self._bury(error)
                    raise
        self.owed = int(reply.get("owed", 0))
        self.proc.hostpid = int(reply["hostpid"])
        self.figures.running, self.figures.ran_after = time.perf_counter(), float(reply["ran_after"])
        await self.arrived(reply)

    async def _bury(self, error: BpfsError) -> None:
        # The only copy died with its worker or its node.
        self.proc.doom = self.proc.doom or ExitStatus(signal=signal.SIGKILL)
        if self.keep is not None:
            self.proc.why = error.sentence
        await self.lost()

    async def _hand_over(self, src: Engine, dst: Engine) -> dict[str, Any] | None:
        """Ends the source, whose engine then tells the destination's that the copy may run.

        Returns:
            What the destination's engine said; None where the word did not get through, and ours is needed.

        Raises:
            BpfsError: the source lives.
        """
        if self.company is not None:
            async with self.company.going(self.proc.pid):
                await self.depart(src, go=False)
                await self.departed()
            await self.company.wait_gone()
            return None
        if faults.is_held(Phase.RESUME.value):
            await self.depart(src, go=False)
            await self.departed()
            return None
        errors: list[BpfsError] = []
        replies: list[dict[str, Any]] = []

        async def leave() -> None:
            try:
                await self.depart(src, go=True)
            except BpfsError as error:
                errors.append(error)
            else:
                await self.departed()

        async def follow() -> None:
            with suppress(BpfsError):  # it died: `resume` will meet that again, if need be
                reply = await dst.call("follow")
                if reply["running"]:
                    replies.append(reply)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave)
            nursery.start_soon(follow)
        if errors and not replies:
            raise errors[0]
        if errors:  # the source's engine died right after its last word
            await self.departed()
        return replies[0] if replies else None

    async def _undo(self, release: Awaitable[object], dst: Engine) -> None:
        # The source first: it is somebody's program that stands still.
        await self._try_to("release", release)
        await self._try_to("discard", dst.call("discard"))
        await self.stay()

    async def _try_to(self, what: str, call: Awaitable[object]) -> None:
        try:
            with trio.fail_after(UNDO_TIMEOUT):
                await call
        except (BpfsError, trio.TooSlowError) as error:
            _log.info("process %d: %s after a failed move: %s", self.proc.pid, what, error)
