"""Master and slaves over real sockets: numbers, states, leases, fences. Simulated slaves, the real protocol."""

from __future__ import annotations

from errno import EHOSTDOWN, EINVAL

import pytest
import trio

from bpfs.config import NodeEntry
from bpfs.errors import BpfsError
from bpfs.nodes import session as session_module
from bpfs.nodes.registry import MASTER
from bpfs.nodes.states import NodeState
from bpfs.wire.handshake import RefusedByMaster
from bpfs.wire.link import now
from bpfs.wire.messages import Fault, Fence, HeartbeatSeen, KillAll
from tests.nodes.simslave import SAMPLE, SimulatedSlave, master


async def test_numbers_wanted_configured_and_next_free(nursery):
    mac = "52:54:00:00:00:07"
    async with master(entries=[NodeEntry(1, (mac,))]) as it:
        assert it.cluster.nodes.numbers == [-1, 1]
        slaves = [
            SimulatedSlave(it.port, number=5),
            SimulatedSlave(it.port, hostname="a"),
            SimulatedSlave(it.port, hostname="b", macs=(mac,)),
            SimulatedSlave(it.port, hostname="c"),
        ]
        for slave, number in zip(slaves, (5, 0, 1, 2), strict=True):
            nursery.start_soon(slave.run)
            await it.wait_state(number, "up")
            assert slave.welcome is not None and slave.welcome.node == number
        # Who had a number without asking for it gets it again.
        slaves[3].leave()
        await it.wait_state(2, "down")
        again = SimulatedSlave(it.port, hostname="c")
        nursery.start_soon(again.run)
        await it.wait_state(2, "up")
        assert it.cluster.nodes.numbers == [-1, 0, 1, 2, 5]


async def test_the_second_with_a_number_is_refused(nursery, caplog):
    async with master() as it:
        nursery.start_soon(SimulatedSlave(it.port, number=3).run)
        await it.wait_state(3, "up")
        with pytest.raises(RefusedByMaster, match="node 3 is connected already, from 127"):
            await SimulatedSlave(it.port, number=3).run()
        assert it.state(3) == "up"
        for number in (-1, -5, 1024, 1 << 40):
            with pytest.raises(RefusedByMaster):
                await SimulatedSlave(it.port, number=number).run()
        assert it.cluster.nodes.numbers == [-1, 3]


async def test_the_same_slave_takes_its_place_again(nursery):
    async with master() as it:
        first = SimulatedSlave(it.port, number=3)
        nursery.start_soon(first.run)
        await it.wait_state(3, "up")
        second = SimulatedSlave(it.port, number=3, machine=first.machine)
        fenced = []
        it.cluster.nodes.listen(lambda node, what: fenced.append(node.state.value) if what == "fenced" else None)
        nursery.start_soon(second.run)
        while second.welcome is None or it.state(3) != "up":
            await it.cluster.events.wait_change()
        assert fenced == ["down"]  # known to have no jobs before it holds new ones
        session = it.cluster.nodes.get(3).session
        assert session is not None
        with pytest.raises(BpfsError):  # ENOSYS: it is the second that answers
            await session.link.request(KillAll())


async def test_heartbeats_are_answered_and_figures_kept(nursery):
    async with master(lease=0.8) as it:
        slave = SimulatedSlave(it.port, number=0)
        nursery.start_soon(slave.run, SAMPLE)
        while len(slave.heard) < 3:
            await trio.sleep(0.01)
        assert slave.heard[:3] == [HeartbeatSeen(1), HeartbeatSeen(2), HeartbeatSeen(3)]
        node = it.cluster.nodes.get(0)
        assert node.state is NodeState.UP and node.sample == SAMPLE and node.address == "127.0.0.1"


async def test_a_silent_node_is_down_only_after_its_lease(nursery):
    async with master(lease=0.5) as it:
        slave = SimulatedSlave(it.port, number=0, beats=False)
        nursery.start_soon(slave.run)
        await it.wait_state(0, "up")
        began = now()
        await it.wait_state(0, "down")
        node = it.cluster.nodes.get(0)
        # Never too early: that is the promise. (Heard last a moment before it was seen to be up.)
        assert now() - began > it.cluster.config.lease
        assert node.reason == "silent for 1.5 s" and not node.doubtful


async def test_a_lost_link_leaves_doubt_until_the_lease_is_over(nursery):
    async with master(lease=0.5) as it:
        slave = SimulatedSlave(it.port, number=0)
        nursery.start_soon(slave.run)
        await it.wait_state(0, "up")
        node = it.cluster.nodes.get(0)
        began = now()
        assert slave.link is not None
        slave.link.close("cut")
        await it.wait_state(0, "down")
        assert node.doubtful
        with pytest.raises(RefusedByMaster, match="former slave may still run"):
            await SimulatedSlave(it.port, number=0).run()
        await node.wait_fenced()
        assert now() - began > it.cluster.config.lease / 2
        nursery.start_soon(SimulatedSlave(it.port, number=0).run)
        await it.wait_state(0, "up")


async def test_the_same_slave_ends_the_doubt(nursery):
    async with master(lease=3600) as it:
        slave = SimulatedSlave(it.port, number=0)
        nursery.start_soon(slave.run)
        await it.wait_state(0, "up")
        node = it.cluster.nodes.get(0)
        assert slave.link is not None
        slave.link.close("cut")
        await it.wait_state(0, "down")
        assert node.doubtful
        nursery.start_soon(SimulatedSlave(it.port, number=0, machine=slave.machine).run)
        await node.wait_fenced()
        await it.wait_state(0, "up")


async def test_good_bye_leaves_no_doubt(nursery):
    async with master(lease=3600) as it:
        slave = SimulatedSlave(it.port, number=0)
        nursery.start_soon(slave.run)
        await it.wait_state(0, "up")
        slave.leave()
        await it.wait_state(0, "down")
        assert it.cluster.nodes.get(0).reason == "the slave was ended"
        await it.cluster.nodes.get(0).wait_fenced()


async def test_a_fault_is_an_error_and_the_administrator_mends_it(nursery):
    async with master() as it:
        slave = SimulatedSlave(it.port, number=0)
        nursery.start_soon(slave.run)
        await it.wait_state(0, "up")
        assert slave.link is not None
        slave.link.notify_nowait(Fault("no more jobs"))
        await it.wait_state(0, "error")
        node = it.cluster.nodes.get(0)
        assert node.reason == "no more jobs"
        await it.cluster.administrator.set_state(node, NodeState.UP)
        assert it.state(0) == "up" and node.reason == ""
        nursery.cancel_scope.cancel()


async def test_who_was_never_ready_starts_afresh_to_be_up(nursery):
    async with master() as it:
        slave, next_life = SimulatedSlave(it.port, number=0, ready=False), SimulatedSlave(it.port, number=0)

        async def lives() -> None:
            await slave.run()
            await next_life.run()

        nursery.start_soon(lives)
        await it.wait_state(0, "boot")
        assert slave.link is not None
        slave.link.notify_nowait(Fault("no job space"))
        await it.wait_state(0, "error")
        await it.cluster.administrator.set_state(it.cluster.nodes.get(0), NodeState.UP)
        assert it.state(0) == "up" and it.cluster.nodes.get(0).session.link.reason == ""
        nursery.cancel_scope.cancel()


async def test_down_and_up_by_the_administrator(nursery):
    async with master() as it:
        slave = SimulatedSlave(it.port, number=0)
        ended = trio.Event()

        async def first_life() -> None:
            await slave.run()
            ended.set()

        nursery.start_soon(first_life)
        await it.wait_state(0, "up")
        node, administrator = it.cluster.nodes.get(0), it.cluster.administrator
        await administrator.set_state(node, NodeState.DOWN)
        assert it.state(0) == "down" and not node.doubtful and node.session is None
        await ended.wait()
        assert slave.heard[-1] == Fence("down by the administrator", "afresh")
        await administrator.set_state(node, NodeState.DOWN)  # once more is no error

        # The slave comes again, is parked, and told when the time has come.
        released = trio.Event()

        async def second_life() -> None:
            again = SimulatedSlave(it.port, number=0, machine=slave.machine)
            with pytest.raises(RefusedByMaster, match="down by the administrator") as caught:
                await again.run()
            assert caught.value.parked
            released.set()
            await again.run()

        nursery.start_soon(second_life)
        await released.wait()
        assert it.state(0) == "down"
        await administrator.set_state(node, NodeState.UP)
        assert it.state(0) == "up"


async def test_what_the_administrator_cannot_wish(nursery):
    async with master() as it:
        administrator, node = it.cluster.administrator, it.cluster.nodes.add(0)
        for wanted, errno in [
            (NodeState.BOOT, EINVAL),
            (NodeState.UNAVAILABLE, EINVAL),
            (NodeState.REBOOT, EHOSTDOWN),
            (NodeState.UP, EHOSTDOWN),
        ]:
            with pytest.raises(BpfsError) as caught:
                await administrator.set_state(node, wanted)
            assert caught.value.errno == errno
        with pytest.raises(BpfsError) as caught:
            await administrator.set_state(it.cluster.nodes.get(MASTER), NodeState.DOWN)
        assert caught.value.errno == EINVAL
        assert it.state(0) == "down" and not node.barred


@pytest.mark.parametrize("state", [NodeState.REBOOT, NodeState.HALT, NodeState.PWROFF])
async def test_reboot_halt_and_pwroff_reach_the_slave(nursery, state):
    async with master() as it:
        slave = SimulatedSlave(it.port, number=0)
        nursery.start_soon(slave.run)
        await it.wait_state(0, "up")
        node = it.cluster.nodes.get(0)
        await it.cluster.administrator.set_state(node, state)
        await it.wait_state(0, "down")
        fence = slave.heard[-1]
        assert isinstance(fence, Fence) and fence.then == state.value
        assert node.reason == fence.reason and not node.doubtful
        nursery.start_soon(SimulatedSlave(it.port, number=0).run)
        await it.wait_state(0, "up")


async def test_a_slave_that_does_not_obey_is_waited_for(nursery, monkeypatch):
    monkeypatch.setattr(session_module, "FENCE_TIMEOUT", 0.05)
    async with master(lease=0.5) as it:
        slave = SimulatedSlave(it.port, number=0, obeys=False)
        nursery.start_soon(slave.run)
        await it.wait_state(0, "up")
        node = it.cluster.nodes.get(0)
        began = now()
        await it.cluster.administrator.set_state(node, NodeState.DOWN)
        # It returned, so no job can be alive: the lease must have been waited for.
        assert not node.doubtful and now() - began > it.cluster.config.lease / 2


async def test_a_thousand_slaves(nursery):
    count = 1000
    async with master() as it:
        for number in range(count):
            nursery.start_soon(SimulatedSlave(it.port, number=number).run, SAMPLE)
        for number in range(count):
            await it.wait_state(number, "up")
        assert len(it.cluster.nodes) == count
        nursery.cancel_scope.cancel()
