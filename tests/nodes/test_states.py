"""The table of transitions, and that nothing gets around it."""

from __future__ import annotations

from errno import EINVAL, ENOENT, ENOSPC

import pytest

from bpfs.errors import BpfsError
from bpfs.nodes.events import KEPT, EventLog
from bpfs.nodes.registry import NodeTable
from bpfs.nodes.states import TRANSITIONS, Cause, NodeState, check, parse_state

ALLOWED = {
    "down": {"boot": "BOOTING JOINED"},
    "boot": {
        "up": "READY",
        "unavailable": "READY",
        "error": "FAULT",
        "down": "ADMIN LOST LEFT",
        "reboot": "ADMIN",
        "halt": "ADMIN",
        "pwroff": "ADMIN",
    },
    "unavailable": {
        "up": "ADMIN",
        "error": "ADMIN FAULT",
        "down": "ADMIN LOST LEFT",
        "reboot": "ADMIN",
        "halt": "ADMIN",
        "pwroff": "ADMIN",
    },
    "up": {
        "unavailable": "ADMIN",
        "error": "ADMIN FAULT",
        "down": "ADMIN LOST LEFT",
        "reboot": "ADMIN",
        "halt": "ADMIN",
        "pwroff": "ADMIN",
    },
    "error": {
        "boot": "ADMIN AGAIN",
        "unavailable": "ADMIN",
        "down": "ADMIN LOST LEFT",
        "reboot": "ADMIN",
        "halt": "ADMIN",
        "pwroff": "ADMIN",
    },
    "reboot": {"down": "ADMIN LOST LEFT"},
    "halt": {"down": "ADMIN LOST LEFT"},
    "pwroff": {"down": "ADMIN LOST LEFT"},
}


@pytest.mark.parametrize("old", NodeState)
@pytest.mark.parametrize("new", NodeState)
@pytest.mark.parametrize("cause", Cause)
def test_every_transition(old, new, cause):
    table = NodeTable(EventLog())
    node = table.add(4)
    table.enter(node, old, "why")
    if old is new:
        table.set_state(node, new, cause, "why")
    elif cause.name in ALLOWED[old.value].get(new.value, "").split():
        table.set_state(node, new, cause, "because")
        assert node.state is new and node.reason == ("" if new is NodeState.UP else "because")
    else:
        with pytest.raises(BpfsError) as caught:
            table.set_state(node, new, cause)
        assert caught.value.errno == EINVAL and "node 4" in str(caught.value)
        assert node.state is old


def test_every_state_can_be_reached_and_left():
    for state in NodeState:
        assert any(target is state for _, target in TRANSITIONS)
        assert any(source is state for source, _ in TRANSITIONS)
    with pytest.raises(BpfsError):
        check(1, NodeState.DOWN, NodeState.UP, Cause.ADMIN)


def test_names():
    names = "down boot unavailable up error reboot halt pwroff"
    assert [state.value for state in NodeState] == names.split()
    for state in NodeState:
        assert parse_state(state.value) is state
    with pytest.raises(BpfsError, match=f"known: {names}"):
        parse_state("UP")


def test_changes_are_events_and_told_to_listeners():
    events = EventLog()
    table = NodeTable(events)
    told = []
    stop = table.listen(lambda node, what: told.append((node.number, what)))
    node = table.add(2)
    table.set_state(node, NodeState.BOOT, Cause.JOINED, "starting")
    table.set_state(node, NodeState.UP, Cause.READY)
    table.set_mode(node, 0o110)
    table.set_mode(node, 0o110)  # no change, no event
    table.set_owner(node, 7)
    table.set_group(node, 8)
    table.set_address(node, "10.0.0.2")
    stop()
    table.set_mode(node, 0o111)
    assert told == [(2, what) for what in ("added", "state", "state", "mode", "owner", "group", "address")]
    assert [event.text for event in events.since(0)] == [
        "node 2 added",
        "node 2 state boot (starting)",
        "node 2 state up",
        "node 2 mode 110",
        "node 2 owner 7",
        "node 2 group 8",
        "node 2 address 10.0.0.2",
        "node 2 mode 111",
    ]
    assert [event.number for event in events.since(0)] == list(range(1, 9))


def test_numbers_and_limits():
    table = NodeTable(EventLog(), limit=3)
    for number in (2, -1, 0):
        table.add(number)
    assert table.numbers == [-1, 0, 2] and len(table) == 2 and [node.number for node in table] == [0, 2]
    for number, errno in ((3, ENOSPC), (-2, ENOSPC)):
        with pytest.raises(BpfsError) as caught:
            table.add(number)
        assert caught.value.errno == errno
    with pytest.raises(BpfsError) as caught:
        table.get(1)
    assert caught.value.errno == ENOENT and str(caught.value) == "there is no node 1"


@pytest.mark.parametrize("mode", [0o112, 0o777, -1, 0o1111])
def test_only_x_bits_are_a_mode(mode):
    table = NodeTable(EventLog())
    with pytest.raises(BpfsError):
        table.set_mode(table.add(0), mode)


async def test_slow_readers_of_events_know_what_they_missed():
    events = EventLog()
    for number in range(KEPT + 10):
        events.post(f"event {number}", 0)
    assert events.lost(0) == 10 and events.lost(10) == 0
    assert [event.number for event in events.since(0)] == list(range(11, KEPT + 11))
    assert [event.number for event in await events.wait_since(KEPT + 8)] == [KEPT + 9, KEPT + 10]
    assert events.since(KEPT + 10) == []


async def test_waiting_for_events(nursery):
    events = EventLog()
    got = []

    async def wait() -> None:
        got.extend(await events.wait_since(0))

    nursery.start_soon(wait)
    nursery.start_soon(wait)
    await _blocked()
    events.post("now", 3)
    await _blocked()
    assert [event.text for event in got] == ["now", "now"]


async def _blocked() -> None:
    import trio.testing

    await trio.testing.wait_all_tasks_blocked()
