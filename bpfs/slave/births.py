"""What jobs of this node fork and become goes to the master, as jobwatch tells it."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

import trio

from bpfs import log
from bpfs.slave.keeper import Keeper
from bpfs.slave.line import Line
from bpfs.slave.spool import Source
from engine.jobwatch import JobWatch

_log = log.get("births")


class BirthWatch:
    """The job space, watched."""

    def __init__(self, watch: JobWatch, link: Line) -> None:
        self._watch = watch
        self._link = link
        self._closed = False

    @classmethod
    def start(cls, init: int, shared: Path | None, link: Line, keeper: Keeper) -> BirthWatch | None:
        """Begin, or go on where a life before has begun; None, with a line in the log, where there is no jobwatch: jobs
        live and fork all the same."""
        for _, kept in keeper.of("watch"):
            return cls(JobWatch(socket.socket(fileno=kept.fds[0])), link)
        try:
            watch = JobWatch.begin(init, shared, lambda *what: keeper.keep(("jobwatch", 0), keeper.spawn(*what)))
            keeper.keep(("watch", 0), None, [watch.socket.fileno()])
            return cls(watch, link)
        except OSError as error:
            _log.error("what jobs fork here stays unknown to the master: no jobwatch: %s", error)
            return None

    async def run(self) -> None:
        """Pass records on until the watch ends."""
        while not self._closed:
            try:
                await trio.lowlevel.wait_readable(self._watch.socket)
                slot = self._link.receive(self._watch.socket, Source.EVENTS)
            except BlockingIOError:
                continue
            except (trio.ClosedResourceError, OSError):
                return
            if slot is not None:
                self._link.tell(slot)
            elif not self._closed:
                _log.error("what jobs fork here stays unknown to the master from now on: jobwatch has died")
                return

    def look(self, pid: int = 0) -> None:
        """Have a job looked at now; 0: jobs are about to come."""
        if not self._closed:
            self._watch.look(pid)

    def close(self) -> None:
        """End it."""
        if not self._closed:
            self._closed = True
            with suppress(OSError):
                trio.lowlevel.notify_closing(self._watch.socket)
            self._watch.close()
