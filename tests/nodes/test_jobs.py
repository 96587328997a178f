"""A node's job space that is closed while it reports."""

from __future__ import annotations

import os
import select
import signal
import socket

import trio
import trio.testing

from bpfs.slave.jobs import Jobs
from bpfs.slave.line import Line
from bpfs.slave.spool import Spool, make_memory
from bpfs.wire.link import Link
from engine.jobspace import JobSpace

BLOCK = range(100_000, 101_000)


class CloseBeforeItsTurn(trio.abc.Instrument):
    """Closes the jobs between what wakes a task that follows them and that task's turn."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self.closed = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """See trio."""
        if task.name == "jobs" and not self.closed:
            self.closed = True
            assert select.select([self._jobs.space.reports], [], [], 0)[0]
            self._jobs.close()


async def test_jobs_that_are_closed_with_a_report_unread_end_like_any_others() -> None:
    ours, theirs = socket.socketpair()
    memory = make_memory()
    space = JobSpace.start(BLOCK)
    jobs = Jobs(space, BLOCK, Line(Link(ours, "nobody"), Spool(memory)))
    why: list[str] = []

    async def follow() -> None:
        why.append(await jobs.run())

    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(follow, name="jobs")
                await trio.testing.wait_all_tasks_blocked()
                instrument = CloseBeforeItsTurn(jobs)
                trio.lowlevel.add_instrument(instrument)
                os.kill(space.init, signal.SIGKILL)  # the end of its socket is something to read
        assert instrument.closed and why == ["the job space is closed"]
    finally:
        space.close()
        theirs.close()
        ours.close()
        os.close(memory)
