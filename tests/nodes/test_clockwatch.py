"""Clocks of nodes: measured over the real protocol, and brought back without a step."""

from __future__ import annotations

import time

import pytest
import trio

from bpfs.nodes import clockwatch
from bpfs.nodes.clockwatch import SLEW_MOST, ClockWatch
from bpfs.wire.messages import ClockIs, Done, ReadClock, SetClock, SlewClock
from tests.nodes.simslave import SimulatedSlave, master

AHEAD = 15_000_000
RATE = 0.04  # so fast that the noise of a loaded machine is small beside it


async def test_a_clock_that_runs_away_is_measured_and_held(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clockwatch, "INTERVAL", 0.4)
    monkeypatch.setattr(clockwatch, "LOOK", 0.02)
    start, gained, told = time.time_ns(), 0, []

    def read(_: ReadClock) -> ClockIs:
        now = time.time_ns()
        return ClockIs(now + AHEAD + round((now - start) * RATE) + gained)

    def slew(message: SlewClock) -> Done:
        nonlocal gained
        told.append(message.gain_ns)
        gained += message.gain_ns
        return Done()

    async with master() as it:
        watch, node = ClockWatch(it.cluster.nodes), it.cluster.nodes.add(0)
        handlers = {ReadClock: read, SlewClock: slew, SetClock: lambda _: Done()}
        nursery.start_soon(SimulatedSlave(it.port, 0, real=True, handlers=handlers).run)
        await it.wait_state(0, "up")
        assert watch.text(node) == ""
        nursery.start_soon(watch.run)
        with trio.fail_after(30):
            while len(told) < 4:
                await trio.sleep(0.01)
            while "drift_ppm" not in watch.text(node):
                await trio.sleep(0.01)
        values = dict(line.split() for line in watch.text(node).splitlines())
        assert 0.7 * RATE < float(values["drift_ppm"]) / 1e6 < 1.3 * RATE, values
        assert int(values["uncertainty_us"]) > 0
        # The first takes back what it was ahead of, as far as one look may; each only ever slows it down.
        assert -SLEW_MOST <= told[0] <= -AHEAD / 2 and all(-SLEW_MOST <= it < 0 for it in told)
        nursery.cancel_scope.cancel()


async def test_a_clock_of_a_slave_that_is_no_real_node_is_only_measured(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[SlewClock] = []
    async with master() as it:
        watch, node = ClockWatch(it.cluster.nodes), it.cluster.nodes.add(0)
        handlers = {ReadClock: lambda _: ClockIs(time.time_ns() - 10**9), SlewClock: told.append}
        nursery.start_soon(SimulatedSlave(it.port, 0, handlers=handlers).run)
        await it.wait_state(0, "up")
        nursery.start_soon(watch.run)
        with trio.fail_after(30):
            while not watch.text(node):
                await trio.sleep(0.01)
        assert -1_100_000 < int(watch.text(node).split()[1]) < -900_000 and not told
        nursery.cancel_scope.cancel()
