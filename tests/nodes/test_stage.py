"""The final stage of a node's start: the administrator's steps, with simulated slaves."""

from __future__ import annotations

import os
from errno import EIO
from pathlib import Path

import pytest
import trio

from bpfs.config import NodeEntry
from bpfs.errors import BpfsError
from bpfs.nodes import admin, power, session
from bpfs.nodes.stage import steps
from bpfs.nodes.states import NodeState
from tests.nodes.simslave import SimulatedSlave, master


def step(folder: Path, name: str, script: str, mode: int = 0o755) -> None:
    """Writes a program."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(mode)


def test_which_programs_are_steps(tmp_path: Path) -> None:
    for name in ("20-b", "10-a", "README.txt", "30.dpkg-old", "99_last"):
        step(tmp_path, name, "true")
    step(tmp_path, "40-off", "true", 0o644)
    (tmp_path / "50-folder").mkdir()
    assert [path.name for path in steps(tmp_path)] == ["10-a", "20-b", "99_last"]
    assert steps(tmp_path / "none") == []


async def test_steps_run_in_order_and_are_logged(nursery: trio.Nursery, tmp_path: Path) -> None:
    step(tmp_path / "up", "10-first", f"echo node $NODE; echo one >> {tmp_path}/trace")
    step(tmp_path / "up", "20-second", f"echo two >> {tmp_path}/trace; printf 'no end of line' >&2")
    async with master(nodeup=tmp_path / "up") as it:
        nursery.start_soon(SimulatedSlave(it.port, 3).run)
        await it.wait_state(3, "up")
        assert (tmp_path / "trace").read_text() == "one\ntwo\n"
        log = it.cluster.logs.text(3)
        assert "10-first: node 3\n" in log and "20-second: no end of line\n" in log
        nursery.cancel_scope.cancel()


async def test_a_step_that_fails_is_the_reason_and_can_be_repeated(nursery: trio.Nursery, tmp_path: Path) -> None:
    step(tmp_path / "up", "10-disk", f"[ -e {tmp_path}/disk ] || {{ echo looking; echo there is no disk; exit 3; }}")
    async with master(nodeup=tmp_path / "up") as it:
        nursery.start_soon(SimulatedSlave(it.port, 0).run)
        await it.wait_state(0, "error")
        node = it.cluster.nodes.get(0)
        assert node.reason == "10-disk: there is no disk"
        with pytest.raises(BpfsError) as failed:
            await it.cluster.administrator.set_state(node, NodeState.UP)
        assert failed.value.code == EIO
        (tmp_path / "disk").touch()
        await it.cluster.administrator.set_state(node, NodeState.UP)
        assert it.state(0) == "up"
        nursery.cancel_scope.cancel()


async def test_a_step_that_fails_is_tried_again(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "FIRST_AGAIN", 0.01)
    step(tmp_path / "up", "10-late", f"echo >> {tmp_path}/tries; [ $(wc -l < {tmp_path}/tries) = 4 ]")
    async with master(nodeup=tmp_path / "up") as it:
        nursery.start_soon(SimulatedSlave(it.port, 0).run)
        await it.wait_state(0, "up")
        assert (tmp_path / "tries").read_text() == 4 * "\n"
        # What the administrator calls an error stays one.
        await it.cluster.administrator.set_state(it.cluster.nodes.get(0), NodeState.ERROR)
        await trio.sleep(0.2)  # that nothing happens can only be seen by waiting
        assert it.state(0) == "error" and it.cluster.nodes.get(0).reason == "error by the administrator"
        nursery.cancel_scope.cancel()


async def test_only_so_many_nodes_at_once(nursery: trio.Nursery, tmp_path: Path) -> None:
    # Each step holds its place until the test lets it go.
    step(tmp_path / "up", "10-hold", f"mkfifo {tmp_path}/go.$NODE; read line < {tmp_path}/go.$NODE")
    async with master(nodeup=tmp_path / "up", nodeparallel=2) as it:
        for number in range(3):
            nursery.start_soon(SimulatedSlave(it.port, number).run)
        with trio.fail_after(30):
            while len(held := [n for n in range(3) if (tmp_path / f"go.{n}").exists()]) < 2:
                await trio.sleep(0.01)
        (waiting,) = set(range(3)) - set(held)
        await it.wait_state(waiting, "boot")
        with trio.fail_after(30):
            while it.cluster.nodes.get(waiting).reason != "waits for its turn in up":
                await trio.sleep(0.01)
        for number in [*held, waiting]:
            with trio.fail_after(30):
                while not (tmp_path / f"go.{number}").exists():
                    await trio.sleep(0.01)
            await trio.to_thread.run_sync((tmp_path / f"go.{number}").write_text, "\n")
        for number in range(3):
            await it.wait_state(number, "up")
        nursery.cancel_scope.cancel()


async def test_a_node_that_goes_ends_its_step(nursery: trio.Nursery, tmp_path: Path) -> None:
    step(tmp_path / "up", "10-long", f"cd {tmp_path}; echo $$ > new; mv new pid; exec sleep 1000")
    async with master(nodeup=tmp_path / "up") as it:
        slave = SimulatedSlave(it.port, 0)
        nursery.start_soon(slave.run)
        with trio.fail_after(30):
            while not (tmp_path / "pid").exists():
                await trio.sleep(0.01)
        assert slave.link is not None
        slave.link.close("gone")
        await it.wait_state(0, "down")
        pid = int((tmp_path / "pid").read_text())
        with trio.fail_after(30), pytest.raises(ProcessLookupError):
            while True:
                os.kill(pid, 0)
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_steps_before_a_node_is_taken_down(nursery: trio.Nursery, tmp_path: Path) -> None:
    step(tmp_path / "down", "10-bye", f"echo $NODE > {tmp_path}/bye; exit 1")
    async with master(nodedown=tmp_path / "down") as it:
        nursery.start_soon(SimulatedSlave(it.port, 5).run)
        await it.wait_state(5, "up")
        await it.cluster.administrator.set_state(it.cluster.nodes.get(5), NodeState.DOWN)
        assert (tmp_path / "bye").read_text() == "5\n" and it.state(5) == "down"
        nursery.cancel_scope.cancel()


async def test_machines_are_switched_by_the_administrators_command(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "UP_TIMEOUT", 0.1)
    monkeypatch.setattr(power, "START_TIMEOUT", 0.3)
    fails = f"[ ! -e {tmp_path}/fails ] || {{ echo no; exit 1; }}"
    step(tmp_path, "switch", f"echo $* $NODE $MACS >> {tmp_path}/trace; {fails}")
    mac = "52:54:00:00:00:07"
    async with master(powercontrol=(f"{tmp_path}/switch", "-q"), entries=[NodeEntry(1, (mac,))]) as it:
        node, administrator = it.cluster.nodes.get(1), it.cluster.administrator
        await administrator.set_state(node, NodeState.UP)
        assert (it.state(1), node.reason) == ("boot", "its machine was told to start")
        # It does not come: it is down again, and says why. It comes late: it is welcome all the same.
        await it.wait_state(1, "down")
        assert "has asked for no address" in node.reason
        for wanted, state in ((NodeState.REBOOT, "down"), (NodeState.PWROFF, "down"), (NodeState.UP, "boot")):
            await administrator.set_state(node, wanted)
            assert it.state(1) == state
        nursery.start_soon(SimulatedSlave(it.port, 1).run)
        await it.wait_state(1, "up")
        verbs = ("on", "cycle", "off", "on")
        assert (tmp_path / "trace").read_text() == "".join(f"-q {verb} 1 1 {mac}\n" for verb in verbs)
        # Held down, and off: nobody waits at the gate.
        other = it.cluster.nodes.add(2)
        await administrator.set_state(other, NodeState.DOWN)
        (tmp_path / "fails").touch()
        with pytest.raises(BpfsError) as failed:
            await administrator.set_state(other, NodeState.UP)
        assert failed.value.code == EIO and failed.value.sentence == "powercontrol: no"
        assert "powercontrol: no" in it.cluster.logs.text(2)
        nursery.cancel_scope.cancel()
