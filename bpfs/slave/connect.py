"""Finding the master: connect, prove, be welcomed; again and again, with back-off and jitter, until it works."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import trio

from bpfs import log
from bpfs.errors import BpfsError, LinkClosed, ProtocolError
from bpfs.slave import machine
from bpfs.slave.clocks import ahead
from bpfs.slave.options import SlaveOptions
from bpfs.wire import handshake, streams
from bpfs.wire.handshake import RefusedByMaster
from bpfs.wire.link import Link, now
from bpfs.wire.messages import Join, Welcome
from engine.facts import facts
from engine.jobspace import Clocks

_log = log.get("wire")

FIRST_DELAY, LAST_DELAY, GROWTH = 0.1, 5.0, 1.6
"""Seconds between attempts: from the first, growing, to the last, each times 0.5 to 1.5 by chance.

A restarted master then has 1,000 slaves back within seconds, and is asked by 200 a second while it is away."""

RESUME_DELAY = 1.0
"""The longest of these delays while jobs wait for the next master: it is to have them within seconds."""

PARKED = 60.0
"""Seconds to stay on a parked connection at most; the master ends it earlier."""


def pauses(longest: float = LAST_DELAY) -> Iterator[float]:
    """Seconds to wait before each attempt after the first."""
    delay = FIRST_DELAY
    while True:
        yield delay * random.uniform(0.5, 1.5)
        delay = min(delay * GROWTH, longest)


def _own_macs() -> tuple[str, ...]:
    found = set()
    for path in Path("/sys/class/net").glob("*/address"):
        try:
            mac = path.read_text().strip()
        except OSError:
            continue
        if len(mac) == 17 and mac != "00:00:00:00:00:00":
            found.add(mac)
    return tuple(sorted(found))


def make_join(number: int | None, identity: bytes, bare: bool = False) -> Join:
    """What this slave says of itself."""
    system = os.uname()
    return Join(
        b"",
        number,
        _own_macs(),
        system.nodename,
        system.release,
        identity,
        machine.is_real_node(),
        facts(bare),
        system.machine,
    )


class Found(NamedTuple):
    """A master.

    Attributes:
        sent: when (`now()`) our proof of life was sent.
        clocks: how far its clocks are ahead of ours; None: they are the same.
    """

    link: Link
    welcome: Welcome
    sent: float
    clocks: Clocks | None


class GivenUp(Exception):
    """No master was found for so long that the machine is to be ended: `how`, reboot or halt."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class Seeker:
    """Looks for the master until it is found."""

    def __init__(self, options: SlaveOptions, join: Join) -> None:
        self._options = options
        self._join = join
        self._complaint = ""
        self._contact = now()  # with a master that proved the key, whatever it said

    async def find(self) -> Found:
        """A link on which the master said welcome.

        Raises:
            GivenUp: this is a real node, which is not to look any longer.
            RefusedByMaster: the master does not take up the jobs of its predecessor (`Join.resumes`).
        """
        resumes = bool(self._join.resumes)
        waits = pauses(RESUME_DELAY if resumes else LAST_DELAY)
        while True:
            try:
                return await self._attempt()
            except RefusedByMaster as refusal:
                if resumes:
                    raise
                self._contact = now()
                self._complain(f"refused: {refusal}")
                if refusal.parked:
                    waits = pauses()
            except (ProtocolError, LinkClosed) as error:
                self._complain(f"the handshake failed: {error} (is the cluster key the same?)")
            except (OSError, BpfsError) as error:
                self._complain(f"cannot connect: {error.strerror or error}")
            except trio.TooSlowError:
                self._complain("the master does not answer")
            self._look_at_clock()
            await trio.sleep(next(waits))

    def _look_at_clock(self) -> None:
        options = self._options
        if options.onlost == "wait" or self._join.resumes:  # who still has jobs has its lease, which ends that
            return
        if self._join.real and now() - self._contact >= options.onlost_after:
            how = "reboot" if options.onlost == "continue" else options.onlost
            _log.error("no master for %g s: %s", options.onlost_after, how)
            raise GivenUp(how)

    def _complain(self, text: str) -> None:
        # One line a reason, not one an attempt.
        if text != self._complaint:
            self._complaint = text
            _log.warning("master %s port %d: %s", self._options.host, self._options.port, text)

    async def _attempt(self) -> Found:
        options = self._options
        with trio.fail_after(handshake.TIMEOUT):
            sock = await streams.connect(options.host, options.port)
        link = Link(sock, "the master")
        try:
            with trio.fail_after(handshake.TIMEOUT):
                sent, began = now(), Clocks.now()
                welcome = await handshake.enter(link, options.key, self._join)
                return Found(link, welcome, sent, ahead(welcome, began))
        except RefusedByMaster as refusal:
            if refusal.parked and not self._join.resumes:
                self._complain(f"refused: {refusal}")
                with trio.move_on_after(PARKED):
                    await link.wait_closed_by_peer()
            link.close("refused")
            raise
        except BaseException:
            link.close("no welcome")
            raise
