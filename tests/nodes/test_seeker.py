"""How slaves look for a master that is away: later and later, never all at once, and in vain only so long."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import trio
import trio.testing

from bpfs.master.listener import open_port
from bpfs.slave.connect import FIRST_DELAY, GROWTH, LAST_DELAY, Found, GivenUp, Seeker, make_join, pauses
from bpfs.slave.options import SlaveOptions
from tests.nodes.simslave import KEY, master

ATTEMPTS = 6


def test_pauses_grow_to_a_bound_and_differ() -> None:
    many = [list(islice(pauses(), 30)) for _ in range(200)]
    for number, column in enumerate(zip(*many, strict=True)):
        middle = min(FIRST_DELAY * GROWTH**number, LAST_DELAY)
        assert middle / 2 <= min(column) < 0.6 * middle
        assert 1.4 * middle < max(column) <= 1.5 * middle
    assert LAST_DELAY * 1.5 < 10  # no node is without a master that is there for longer


async def turn_away(attempts: int, paused: list[float]) -> None:
    """Lets one slave come so often in vain, and notes its pauses as multiples of their middle."""
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = listener.socket.getsockname()[1]
    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(Seeker(SlaveOptions("127.0.0.1", port, KEY), make_join(None, bytes(16))).find)
        closed = 0.0
        for attempt in range(attempts):
            stream = await listener.accept()
            if attempt:
                # Since it could know that it was turned away: a busy machine makes that longer, never shorter.
                paused.append((trio.current_time() - closed) / (FIRST_DELAY * GROWTH ** (attempt - 1)))
            closed = trio.current_time()
            await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_attempts_are_spread() -> None:
    paused: list[float] = []
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(turn_away, 6, paused)
    assert min(paused) >= 0.5
    assert min(paused) < 0.95  # of 50, each as likely as not


@pytest.mark.parametrize("resumes", ["", "cluster"])
async def test_a_machine_ends_for_want_of_a_master_only_when_it_has_killed_its_jobs(resumes: str) -> None:
    with open_port("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    join = replace(make_join(None, bytes(16)), real=True, resumes=resumes.encode())
    seeker = Seeker(SlaveOptions("127.0.0.1", port, KEY, onlost="reboot", onlost_after=0.0), join)
    with trio.move_on_after(60 if not resumes else 2 * FIRST_DELAY) as scope:
        with pytest.raises(GivenUp, match="reboot"):
            await seeker.find()
    assert scope.cancelled_caught == bool(resumes)


async def test_who_comes_late_is_found() -> None:
    with open_port("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    async with trio.open_nursery() as nursery:
        seeker = Seeker(SlaveOptions("127.0.0.1", port, KEY), make_join(None, bytes(16)))
        send, receive = trio.open_memory_channel[Found](1)

        async def seek() -> None:
            await send.send(await seeker.find())

        nursery.start_soon(seek)
        await trio.testing.wait_all_tasks_blocked()  # nobody listens, and it waits
        async with master(port):
            with trio.fail_after(60):
                found = await receive.receive()
            assert found.welcome.node == 0
            found.link.close("seen")


ITSELF = """
import trio
from bpfs.master.listener import open_port
from bpfs.wire.streams import connect
try:
    trio.run(connect, "127.0.0.1", 40001)
except ConnectionRefusedError:
    with open_port("127.0.0.1", 40001):
        print("free")
"""


def test_nobody_connects_to_itself() -> None:
    # The only port that the kernel has to give is the master's, who is away.
    ports = "/proc/sys/net/ipv4/ip_local_port_range"
    script = f'ip link set lo up; echo 40001 40001 > {ports}; exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "-n", "sh", "-ec", script, sys.executable, ITSELF],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("free\n", "")
