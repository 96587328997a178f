"""The nodes' clocks, after the master has set them at the start: how far they are off, and how fast they run away.

A real node's clock is brought back by adjtime(3), a little at a time: it runs slower or faster for a while. It never
steps, for jobs would see that. How long a question was on its way is known, how long one way took is not: so of several
the quickest counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.nodes.registry import Node, NodeTable
from bpfs.nodes.session import Session
from bpfs.tree.entries import File
from bpfs.tree.formats import key_values
from bpfs.wire.messages import ClockIs, ReadClock, SlewClock

_log = log.get("nodes")

INTERVAL = 60.0
"""Seconds between two looks at a node."""
LOOK = 5.0
"""Seconds between two looks for nodes whose turn it is."""
QUESTIONS = 5
TIMEOUT = 5.0

SLEW_MOST = 25_000_000
"""Nanoseconds to be gained or lost until the next look: adjtime does 500 ppm (kernel/time/ntp.c, MAX_TICKADJ), 30 ms a
minute, so it is done by then."""

FAR = 500_000_000
"""Nanoseconds that are worth a warning: jobs that compare times of files notice."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One look.

    Attributes:
        session: whose clock it was.
        when: nanoseconds of our monotonic clock.
        offset: nanoseconds that the node's clock is ahead.
        uncertainty: by which that may be wrong, either way.
        slewed: what it was told to gain since.
        drift: nanoseconds a second by which it runs away by itself; None after the first look.
    """

    session: Session
    when: int
    offset: int
    uncertainty: int
    slewed: int = 0
    drift: float | None = None


def correction(reading: Reading) -> int:
    """What a clock is to be told to gain; nothing where that would be guessing."""
    if abs(reading.offset) <= reading.uncertainty:
        return 0
    return max(-SLEW_MOST, min(SLEW_MOST, -reading.offset))


class ClockWatch:
    """Looks at the clocks of all nodes, each in its turn."""

    def __init__(self, nodes: NodeTable, clock: Callable[[], int] = time.time_ns) -> None:
        self._nodes = nodes
        self._clock = clock
        self._readings: dict[int, Reading] = {}

    def entry(self) -> File[Node]:
        """The file nodes/N/clock."""
        return File("clock", "how far its clock is ahead of the master's, and its drift", read=self.text)

    def text(self, node: Node) -> str:
        """What is known of a node's clock; empty while nothing is."""
        reading = self._readings.get(node.number)
        if reading is None or reading.session is not node.session:
            return ""
        values: dict[str, object] = {
            "offset_us": reading.offset // 1000, "uncertainty_us": reading.uncertainty // 1000 + 1,
        }  # fmt: skip
        if reading.drift is not None:
            values["drift_ppm"] = f"{reading.drift / 1000:.1f}"
        return key_values(values)

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            async with trio.open_nursery() as nursery:
                now = time.monotonic_ns()
                for node in self._nodes:
                    last = self._readings.get(node.number)
                    if node.session is None or not node.state.holds_jobs:
                        self._readings.pop(node.number, None)
                    elif last is None or last.session is not node.session or now - last.when >= INTERVAL * 1e9:
                        nursery.start_soon(self._look, node, node.session)
            await trio.sleep(LOOK)

    async def _look(self, node: Node, session: Session) -> None:
        try:
            reading = await self._read(session)
            last = self._readings.get(node.number)
            if last is not None and last.session is session:
                gained = reading.offset - last.offset - last.slewed
                drift = gained / ((reading.when - last.when) / 1e9)
                reading = Reading(session, reading.when, reading.offset, reading.uncertainty, 0, drift)
            if abs(reading.offset) > FAR:
                _log.warning("the clock of node %d is off by %.1f s", node.number, reading.offset / 1e9)
            slew = correction(reading) if session.real else 0
            if slew:
                await session.link.request(SlewClock(slew), TIMEOUT)
            self._readings[node.number] = Reading(
                session, reading.when, reading.offset, reading.uncertainty, slew, reading.drift
            )
        except BpfsError as error:  # it went away, or is too busy to answer: another time
            _log.debug("the clock of node %d: %s", node.number, error)

    async def _read(self, session: Session) -> Reading:
        best: Reading | None = None
        for _ in range(QUESTIONS):
            asked, began = self._clock(), time.monotonic_ns()
            answer: ClockIs = await session.link.request(ReadClock(), TIMEOUT)
            ended = time.monotonic_ns()
            half = (ended - began) // 2
            reading = Reading(session, ended, answer.realtime_ns - asked - half, half)
            if best is None or half < best.uncertainty:
                best = reading
        assert best is not None
        return best
