"""Jobs whose master is lost for longer than the lease, where the configuration lets them run on (`onlost continue`).

Their ghosts have ended as if killed. They run to their end here, nobody hears of them, and no new ones come. What they
write to what was their ghosts' is dropped, what they read from it is at its end (bpfs/slave/noghost.py); files are
theirs as before.

What was on its way when the master was lost is killed all the same: its other copy may live.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import Final

import trio

from bpfs.slave.jobs import Jobs
from engine.linux import procfs

LOOK_EVERY: Final = 1.0  # seconds between looks whether jobs are left
START_TICK: Final = 1 / os.sysconf("SC_CLK_TCK")  # seconds: what start times are rounded to


def unsettled(jobs: Jobs, since: float | None) -> set[int]:
    """Pids of jobs of which there may be another copy: those that engine workers hold, and those that have come since.

    Args:
        since: when the oldest move that is not finished began, in seconds of CLOCK_BOOTTIME; None: there is none.
    """
    if since is None:
        return set()
    found = set()
    for pid in jobs.space.processes():
        hostpid = jobs.space.hostpid(pid)
        if hostpid is None:
            continue
        with suppress(OSError):
            status = procfs.parse_status(procfs.read(procfs.own_file(hostpid, "status")))
            start = procfs.parse_stat(procfs.read(procfs.own_file(hostpid, "stat"))).starttime * START_TICK
            if status["TracerPid"] != "0" or (start >= since - START_TICK and not jobs.is_native(pid)):
                found.add(pid)
    return found


async def run_out(jobs: Jobs, doubtful: set[int]) -> None:
    """Kill what may live elsewhere, and wait until the others have ended. Who is stopped, with nobody left to continue
    it, gets what the kernel sends to orphaned groups."""
    for pid in doubtful:
        jobs.send(pid, signal.SIGKILL)
    while alive := jobs.space.processes():
        for pid in alive:
            if jobs.is_stopped(pid):
                jobs.send(pid, signal.SIGHUP)
                jobs.send(pid, signal.SIGCONT)
        await trio.sleep(LOOK_EVERY)
