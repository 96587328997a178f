"""One life of a slave: connect, hold jobs, end. The composition root of bpslave; its supervisor makes the next
life.

Whatever ends it (the lease, a fence, a signal), the way out is the same: leave the nursery, kill the jobs, exit with a
code that says what next. What is left after that, the supervisor kills. The end of the link alone ends no life: within
the lease a new master may come that takes up its predecessor's jobs. Only kill -9 leaves the jobs alive: what the next
life needs to take them up, the supervisor has by then (keeper.py).
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from errno import EINVAL
from typing import Any, NamedTuple

import trio

from bpfs import daemon, kernel, log
from bpfs.engines import Workers
from bpfs.errors import BpfsError, LinkClosed, first_error
from bpfs.figures import figure
from bpfs.sample import LOOK_EVERY, Sampler
from bpfs.slave import machine, orphans
from bpfs.slave.births import BirthWatch
from bpfs.slave.connect import GivenUp, Seeker, make_join
from bpfs.slave.enginehost import EngineHost, HeldFds
from bpfs.slave.images import Images
from bpfs.slave.jobs import Jobs
from bpfs.slave.keeper import Keeper
from bpfs.slave.lease import Lease
from bpfs.slave.line import Line
from bpfs.slave.makejob import JobMaker
from bpfs.slave.names import NamesFile
from bpfs.slave.options import SlaveOptions
from bpfs.slave.relay import Relay, open_relay
from bpfs.slave.remote_tree import mounted
from bpfs.slave.spool import Spool, make_memory
from bpfs.slave.stdio import StdioHost
from bpfs.slave.strict import StrictJobs
from bpfs.slave.supervisor import READY, End
from bpfs.slave.view import NodeView, no_cache
from bpfs.wire.handshake import RefusedByMaster
from bpfs.wire.link import Link, now
from bpfs.wire.messages import (
    CacheCall,
    ClockIs,
    Done,
    DropImage,
    DropPlaceholder,
    EngineCall,
    EngineClose,
    EngineOpen,
    Fault,
    FdClose,
    FdWhere,
    Fence,
    Figure,
    FigureIs,
    HeartbeatSeen,
    HoldImage,
    HostPidOf,
    JobsStatus,
    JobStatus,
    Join,
    KillAll,
    Leaving,
    MakeJob,
    Message,
    Names,
    ReadClock,
    Ready,
    RelayAttach,
    RelayDetach,
    Resumed,
    Sample,
    SetClock,
    Signal,
    SlewClock,
    StandIn,
    StandInLeads,
    Welcome,
)
from engine.jobspace import Clocks
from engine.zygote import Zygote

_log = log.get("slave")

THEN = {"afresh": End.AFRESH, "reboot": End.REBOOT, "halt": End.HALT, "pwroff": End.PWROFF}

FAULT_PAUSE = 30.0
"""Seconds that a node is in `error` which could not make ready for jobs, before it starts afresh."""

LAST_WORDS = 2.0
"""Seconds for the answer to a fence to reach the master, which closes the link then."""


class Slave:
    """What one life has; other parts hang their handlers and tasks into it."""

    def __init__(
        self,
        options: SlaveOptions,
        link: Link,
        welcome: Welcome,
        workers: Workers,
        join: Join,
        keeper: Keeper,
        spool: Spool,
        clocks: Clocks | None = None,
    ) -> None:
        self.options = options
        self.keeper = keeper
        self.link = Line(link, spool)
        self.welcome = welcome
        self.clocks = clocks
        self.number = welcome.node
        self._join = join
        self.workers = workers
        self.held = HeldFds(keeper)
        self.engines = EngineHost(workers, self.held)
        self.images = Images(link)
        self.jobs: Jobs | None = None
        self.stdio: StdioHost | None = None
        self.births: BirthWatch | None = None
        self.strict: StrictJobs | None = None
        self.view: NodeView | None = None
        self.names = NamesFile(welcome, options.mount, link.peer_address)
        self.end: End = End.AFRESH
        self.handlers: dict[type[Message], Callable[[Any], Any]] = {
            EngineOpen: self.engines.open,
            EngineCall: self.engines.call,
            EngineClose: self.engines.close,
            HoldImage: self.images.hold,
            DropImage: self.images.drop,
            FdClose: self.held.close,
            Names: lambda message: self.names.hear(message, self.view.root if self.view is not None else None),
            FdWhere: self.held.where,
            Fence: self._fence,
            SetClock: self._set_clock,
            ReadClock: lambda _: ClockIs(time.time_ns()),
            Figure: _tell_figure,
            SlewClock: lambda message: machine.slew_clock(message.gain_ns),
        }
        self._nursery: trio.Nursery | None = None
        self._mounted: str | None = None
        self._stopping = False
        self._orphaned = False
        self._doubtful: set[int] = set()  # jobs that were on their way when the link ended
        self._seeking = trio.CancelScope()
        self._ready: Ready | None = None  # as it was said, and the last sample: the next master wants to hear both
        self._sample: Sample | None = None

    async def run(self, lease: Lease) -> End:
        """Be the node until something ends it; no job lives when it returns."""
        self.handlers[HeartbeatSeen] = lease.seen
        try:
            async with AsyncExitStack() as stack:
                relay = await stack.enter_async_context(open_relay(keeper=self.keeper))
                # Before the job space, whose mounts are copies of ours.
                await self._mount_tree(stack)
                nursery = await stack.enter_async_context(trio.open_nursery())
                self._nursery = nursery
                self._serve_stdio(relay, nursery)
                nursery.start_soon(self._until_told, name="signals")
                nursery.start_soon(self._follow_masters, lease, name="link")
                nursery.start_soon(self._until_lease_ends, lease, name="lease")
                await self._start_view(nursery)
                self._make_job_space(lease)
                nursery.start_soon(self._send_samples, name="samples")
                nursery.start_soon(self.workers.keep_spare, name="spare worker")
                if self.jobs is not None:
                    nursery.start_soon(self._until_jobs_end, self.jobs, name="job reports")
                    nursery.start_soon(self.jobs.keep_swept, name="placeholders")
                    nursery.start_soon(self.jobs.keep_reserved, name="reserved pids")
                    if self.births is not None:
                        nursery.start_soon(self.births.run, name="births")
                    if self.strict is not None:
                        nursery.start_soon(self.strict.run, name="strict jobs")
                    door = await self.images.open(nursery)
                    self._ready = Ready(self.jobs.init, machine.is_real_node(), door)
                    if self._join.returns:
                        await self._take_up(self.jobs)
                    else:
                        self.link.notify_nowait(self._ready)
                    self._note_master()
        except* BpfsError as group:  # the link was closed, or iorelay died
            if not self._stopping:  # else it is a consequence
                _log.warning("starting afresh: %s", first_error(group))
        finally:
            self._kill_jobs()
            self.link.close("the slave ends")
        return self.end

    async def _mount_tree(self, stack: AsyncExitStack) -> None:
        if self.options.mount is None:
            return
        try:
            await stack.enter_async_context(mounted(self.link, self.options.mount))
            self._mounted = self.options.mount
        except BpfsError as error:  # a node without its own tree is of use all the same
            _log.error("no tree on this node: %s", error)

    def _serve_stdio(self, relay: Relay, nursery: trio.Nursery) -> None:
        stdio = self.stdio = StdioHost(relay, self.held, self.options, self.link, self.keeper)
        self.handlers |= {RelayAttach: stdio.attach, RelayDetach: stdio.detach}
        nursery.start_soon(stdio.watch, name="streams")

    async def _start_view(self, nursery: trio.Nursery) -> None:
        if not self.options.empty:
            self.handlers[CacheCall] = no_cache
            return
        view = NodeView(self.options, self.link, self.keeper)
        self.handlers[CacheCall] = view.call
        try:
            await nursery.start(view.run, name="view")
            self.view = view
        except BpfsError as error:
            if self._join.returns:
                raise
            self._tell_fault(error)

    def _tell_fault(self, error: BpfsError) -> None:
        """Have the master show why this node can hold no jobs, and try again: whatever was slow may be so no more."""
        _log.error("%s", error)
        self.link.notify_nowait(Fault(error.sentence))
        if self._nursery is not None:
            self._nursery.start_soon(self._start_again, name="another start")

    async def _start_again(self) -> None:
        await trio.sleep(FAULT_PAUSE)
        self._stop(End.AFRESH, "it tries once more to hold jobs")

    def _make_job_space(self, lease: Lease) -> None:
        if self.options.empty and self.view is None:
            return  # jobs without a root of their own would have ours
        root = str(self.view.root) if self.view is not None else None
        block = range(self.welcome.block_first, self.welcome.block_last + 1)
        try:
            if self._join.returns:
                jobs = self.jobs = Jobs.adopt(block, self.link, self.keeper)
            else:
                taken = dict(zip(self.welcome.taken, self.welcome.owners, strict=True))
                jobs = self.jobs = Jobs.start(block, self.link, self.keeper, root, self.clocks, taken)
        except BpfsError as error:
            if self._join.returns:
                raise  # nothing is left to be taken up
            self._tell_fault(error)
            return
        lease.hold(jobs.space)
        if self.stdio is not None:
            self.stdio.init = jobs.init
        self.handlers |= {
            Signal: jobs.signal,
            KillAll: jobs.kill_all,
            HostPidOf: jobs.hostpid,
            StandIn: jobs.stand_in,
            StandInLeads: jobs.stand_in_leads,
            JobStatus: jobs.status,
            JobsStatus: jobs.statuses,
            DropPlaceholder: jobs.drop_placeholder,
        }
        if self.stdio is not None:
            maker = JobMaker(jobs, self.stdio, self.engines, self.workers, self.held, self.images)
            self.handlers[MakeJob] = maker.make
        self.engines.before = jobs.sweep
        births = BirthWatch.start(jobs.init, self.options.watch, self.link, self.keeper)
        self.births = jobs.births = self.engines.births = births
        try:
            self.strict = StrictJobs(jobs.space, self.link, self.keeper)
        except OSError as error:
            _log.error("this node takes no strict jobs: %s", error)

    def _kill_jobs(self) -> None:
        """Kill all jobs; returns when none lives. Waits for nothing that this very task would have to do."""
        self._stopping = True
        self.keeper.clear()
        self.engines.close_all()
        if self.jobs is not None:
            self.jobs.kill()
            # A process that waits for an answer of our tree cannot die before it has one: abort them all.
            if self._mounted is not None:
                with suppress(OSError):
                    kernel.umount(self._mounted, kernel.MNT_FORCE)
            if self.view is not None:
                self.view.abort()
            self.jobs.close()
        if self.births is not None:
            self.births.close()
        if self.strict is not None:
            self.strict.close()
        self.held.close()

    def _stop(self, end: End, reason: str) -> None:
        self.end = end
        _log.info("this life of the slave ends: %s", reason)
        # Now, not on the way out: the lease may be over.
        self._kill_jobs()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    # -- what ends a life --------------------------------------------------------------------------

    async def _follow_masters(self, lease: Lease) -> None:
        while True:
            reason = await self.link.run(self.handlers)
            if self._orphaned:
                return
            if self._stopping or self.jobs is None:
                self._stop(self.end, reason)  # which a fence may have set
                return
            _log.warning("%s; jobs wait for the next master", reason)
            self._undo(self.jobs)
            try:
                with trio.CancelScope() as self._seeking:
                    await self._find_next(lease, self.jobs)
            except RefusedByMaster as refusal:
                if self.welcome.onlost == "continue":
                    return  # when the lease is over they run on without a master
                self._stop(End.AFRESH, f"{reason}; refused with its jobs: {refusal}")
                return
            except GivenUp as given_up:
                self._stop(THEN[given_up.how], reason)
                return

    async def _find_next(self, lease: Lease, jobs: Jobs) -> None:
        """Wait for a master that takes up the jobs; the lease ends all waiting."""
        old = self.welcome
        join = replace(self._join, wanted=self.number, resumes=old.cluster, generation=old.generation, returns=False)
        join = replace(join, told=self.link.told)
        link, welcome, sent, _ = await Seeker(self.options, join).find()
        if self._stopping:
            link.close("the slave ends")
            return
        self.welcome = welcome
        lease.renew(welcome, sent)
        self._doubtful.clear()
        self._tell_present(jobs, link, None)
        self._note_master()
        if self._sample is not None:
            self.link.notify_nowait(self._sample)
        _log.info("another master has taken up the jobs of node %d", self.number)

    async def _take_up(self, jobs: Jobs) -> None:
        """Go on with the jobs of a life that was killed."""
        if self.stdio is not None:
            await self.stdio.take_up()
        left = master_of(self.keeper)
        self._tell_present(jobs, self.link.link, self.welcome.heard if left.is_same(self.welcome) else None)
        _log.info("took up %d jobs of node %d", len(jobs.space.processes()), self.number)

    def _tell_present(self, jobs: Jobs, link: Link, heard: int | None) -> None:
        alive, stopped = jobs.present()
        broken = self.stdio.broken if self.stdio is not None else ()
        self.link.take_over(link, set(alive), heard)
        if self._ready is not None:
            self.link.notify_nowait(self._ready)
        self.link.notify_nowait(Resumed(alive, stopped, tuple(broken), tuple(self.held)))

    def _note_master(self) -> None:
        """From now on another life may go on with the jobs."""
        told = self.welcome
        self.keeper.keep((READY, 0), [told.node, told.cluster, told.generation])

    def _undo(self, jobs: Jobs) -> None:
        """Undo what was under way between two masters."""
        if self.welcome.onlost == "continue":
            self._doubtful |= orphans.unsettled(jobs, self.engines.oldest)
        self.engines.close_all()

    async def _until_lease_ends(self, lease: Lease) -> None:
        await lease.run()
        reason = f"no answer from the master for {self.welcome.lease:g} s"
        if self.welcome.onlost == "continue" and self.jobs is not None and not self._stopping:
            await self._run_out(self.jobs, reason)
            reason = "the last of the jobs that ran on has ended"
        self._stop(End.AFRESH, reason)

    async def _run_out(self, jobs: Jobs, reason: str) -> None:
        """Without a master, until no job is left."""
        _log.warning("%s; jobs run on to their end", reason)
        self._orphaned = True
        self._seeking.cancel()
        if not self.link.link.reason:
            self._undo(jobs)
            self.link.close(reason)
        if self.stdio is not None and self._nursery is not None:
            await self.stdio.do_without_ghosts(self._nursery)
        await orphans.run_out(jobs, self._doubtful)

    async def _until_jobs_end(self, jobs: Jobs) -> None:
        reason = await jobs.run()
        if not jobs.closed:
            with suppress(LinkClosed):
                self.link.notify_nowait(Leaving(reason))
            self._stop(End.AFRESH, reason)

    async def _until_told(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                self._kill_jobs()
                with suppress(LinkClosed):
                    self.link.notify_nowait(Leaving("the slave was ended"))
                self._stop(End.FOR_GOOD, "told to end")

    async def _fence(self, message: Fence) -> Done:
        """Handler: kill the jobs, answer, end."""
        if message.then not in THEN:
            raise BpfsError(EINVAL, f"{message.then!r} is nothing to do after a fence")
        _log.info("fenced by the master: %s", message.reason)
        self.end = THEN[message.then]
        self._kill_jobs()
        if self._nursery is not None:
            self._nursery.start_soon(self._end_soon, name="end after fence")
        return Done()

    async def _end_soon(self) -> None:
        await trio.sleep(LAST_WORDS)
        self._stop(self.end, "fenced")

    # -- the rest ----------------------------------------------------------------------------------

    def _set_clock(self, message: SetClock) -> None:
        machine.set_clock(message.realtime_ns)

    async def _send_samples(self) -> None:
        sampler = Sampler()
        try:
            while True:
                sample = sampler.take_changed()
                if sample is not None:
                    self._sample = sample
                    with suppress(LinkClosed):
                        await self.link.notify(sample)
                await trio.sleep(LOOK_EVERY)
        finally:
            sampler.close()


async def _tell_figure(message: Figure) -> FigureIs:
    # In a thread: a file system may keep who asks for it waiting.
    return FigureIs(await trio.to_thread.run_sync(figure, message.name, abandon_on_cancel=True))


def _spool(keeper: Keeper) -> Spool:
    for _, kept in keeper.of("spool"):
        return Spool(kept.fds[0])
    memory = make_memory()
    try:
        keeper.keep(("spool", 0), None, [memory])
        return Spool(memory)
    finally:
        os.close(memory)


class Left(NamedTuple):
    """The master of a life before."""

    node: int
    cluster: bytes
    generation: int

    def is_same(self, welcome: Welcome) -> bool:
        """Whether this is its word, and not that of a master after it."""
        return (self.cluster, self.generation) == (welcome.cluster, welcome.generation)


def master_of(keeper: Keeper) -> Left:
    """Who was the master of the life before."""
    ((_, kept),) = keeper.of(READY)
    return Left(*kept.value)


def live(options: SlaveOptions, keeper: Keeper, identity: bytes, number: int | None) -> int:
    """Live once; gives the exit code for the supervisor."""
    kernel.set_title(f"bpslave: node {'?' if number is None else number} of {options.host} port {options.port}")
    daemon.raise_limits()
    zygote = Zygote.start()
    try:
        return int(trio.run(_live, options, keeper, identity, number, zygote))
    finally:
        zygote.close()


async def _live(options: SlaveOptions, keeper: Keeper, identity: bytes, number: int | None, zygote: Zygote) -> End:
    join, spool = make_join(number, identity, options.empty), _spool(keeper)
    if keeper.kept:
        node, cluster, generation = master_of(keeper)
        join = replace(join, wanted=node, resumes=cluster, generation=generation, returns=True, told=spool.last)
    slave: Slave | None = None
    try:
        with trio.move_on_after(keeper.lease_end - now() if keeper.kept else math.inf):
            link, welcome, sent, clocks = await Seeker(options, join).find()
            _log.info("welcome as node %d, lease %g s", welcome.node, welcome.lease)
            slave = Slave(options, link, welcome, Workers(zygote), join, keeper, spool, clocks)
            lease = Lease(slave.link, welcome, sent, keeper)
    except GivenUp as given_up:
        return THEN[given_up.how]
    except RefusedByMaster as refusal:
        _log.warning("refused with the jobs of the last life: %s", refusal)
        return End.AFRESH
    if slave is None:
        _log.warning("no master took up the jobs of the last life within the lease")
        return End.AFRESH
    return await slave.run(lease)
