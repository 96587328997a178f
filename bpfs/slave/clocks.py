"""The jobs' clocks: those of the master, so that CLOCK_MONOTONIC and CLOCK_BOOTTIME never run backwards for a process
that moves. They start at a machine's boot, which was another time on every machine.

Set once, when the slave joins: the kernel keeps the difference from the node's own clocks as long as the job space
lives. (Two machines' clocks drift apart by some ms an hour unless NTP or the like holds them.)
"""

from __future__ import annotations

from bpfs.wire.messages import Welcome
from engine.descriptors.model import boot_id
from engine.jobspace import Clocks

SINCE_STAMP = 0.25
"""Part of the handshake (two round trips) that is still to come when the master reads its clocks."""


def ahead(welcome: Welcome, began: Clocks) -> Clocks | None:
    """How far the master's clocks are ahead of this machine's; None where they are the same ones.

    Right to half a round trip, which is less than a process stands still in a move.

    Args:
        welcome: has just come.
        began: our clocks when the handshake began.
    """
    if welcome.boot == boot_id():
        return None
    now = Clocks.now()
    passed = round((now.monotonic - began.monotonic) * SINCE_STAMP)
    return Clocks(welcome.monotonic + passed - now.monotonic, welcome.boottime + passed - now.boottime)
