# SPDX-License-Identifier: GPL-2.0-or-later
"""bpcp's own half: starts an agent at every place of a copy, arranges them in a tree, and hears what they say.

The tree (bpfs/fanout.py) has two below each, so that the source's link carries everything twice at
most. Whose feed is lost because a place above is, gets it in another round, in a tree without those that failed.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpfs.copy.frames import STANDS_STILL
from bpfs.fanout import below

HERE = None
"""The place of this program itself: no bpsh is needed there."""

FANOUT = 2
START_S = 60.0
"""Seconds for an agent to start."""

_TOP = str(Path(__file__).resolve().parents[2])
_BOOT = f"import sys; sys.path.insert(0, {_TOP!r}); sys.argv[0] = 'bpcp'; from bpfs.copy import agent; "
_RUN = _BOOT + "raise SystemExit(agent.main(*sys.argv[1:]))"


@dataclass
class Options:
    """What all places are told."""

    target: str
    folder: bool
    preserve: bool
    recursive: bool
    rate: float
    stall: float


@dataclass
class Place:
    """One agent, and what it has said.

    Attributes:
        node: its node; HERE for this program's own machine.
        done: how many files failed there; None while it is not done.
        lost: its feed ended too early: another round may help it.
        dropped: why it was given up.
        heard: when it last said something, or had reason to.
        rest: unfinished lines of its pipes, by descriptor.
        below: those that it feeds.
    """

    node: int | None
    process: subprocess.Popen[bytes]
    port: int = 0
    ready: bool = False
    done: int | None = None
    lost: str = ""
    dropped: str = ""
    last_words: str = ""
    heard: float = 0.0
    rest: dict[int, bytes] = field(default_factory=dict)
    below: list[Place] = field(default_factory=list)

    def name(self) -> str:
        """For messages."""
        return "" if self.node is HERE else f"node {self.node}: "


class Transfer:
    """One source's copy to all targets."""

    def __init__(
        self,
        options: Options,
        bpsh: Sequence[str],
        address: Callable[[int | None], str],
        *,
        complain: Callable[[str], None],
        progress: Callable[[int, int, int], None],
    ) -> None:
        """Args:
        bpsh: the command that has a node's number and a program put behind it.
        address: of a place in the cluster's network.
        complain: gets sentences that name node and file.
        progress: gets bytes sent, bytes in all, and how many targets are done.
        """
        self._options = options
        self._bpsh = bpsh
        self._address = address
        self._complain = complain
        self._progress = progress
        self._sent = self._total = self._finished = 0

    def run(self, node: int | None, sources: list[str], targets: Sequence[int | None], suffix: str = "") -> bool:
        """Copies sources of one place to all targets; returns whether everything arrived everywhere."""
        perfect = True
        waiting = list(targets)
        while waiting:
            source, places = self._round(node, sources, waiting, suffix)
            orphans = [place for place in places if place.lost and place.ready and not place.dropped]
            for place in places:
                if place not in orphans and place.done != 0:
                    perfect = False
                    self._explain(place)
            if source.done != 0:
                perfect = False
                self._explain(source)
            # Each further round is without somebody who failed, or there is none.
            if source.done is None or len(orphans) == len(waiting):
                for place in orphans:
                    self._complain(f"{place.name()}{place.lost}")
                return perfect and not orphans
            waiting = [place.node for place in orphans]
        return perfect

    def _explain(self, place: Place) -> None:
        if place.done is None:  # else it has named its files
            why = place.dropped or place.lost or place.last_words or "it was lost before the copy was whole"
            self._complain(f"{place.name()}{why}")

    def _round(
        self, node: int | None, sources: list[str], targets: Sequence[int | None], suffix: str
    ) -> tuple[Place, list[Place]]:
        self._sent = self._total = self._finished = 0
        places: list[Place] = []
        try:
            with selectors.DefaultSelector() as selector:
                for target in [node, *targets]:
                    places.append(self._start(target, "receive" if places else "send", selector))
                self._listen(selector, places, until_ready=True)
                self._give_orders(places, sources, suffix)
                self._listen(selector, places, until_ready=False)
        finally:
            for place in places:
                place.process.kill()
                place.process.wait()
        return places[0], places[1:]

    def _start(self, node: int | None, role: str, selector: selectors.BaseSelector) -> Place:
        program = [sys.executable, "-S", "-E", "-c", _RUN, role, self._address(node)]
        command = program if node is HERE else [*self._bpsh, str(node), "--", *program]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        place = Place(node, process)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            place.rest[pipe.fileno()] = b""
            selector.register(pipe, selectors.EVENT_READ, place)
        return place

    def _listen(self, selector: selectors.BaseSelector, places: list[Place], *, until_ready: bool) -> None:
        """Hears everybody, until all are ready (or ended, or it takes too long), or until all have ended."""
        deadline = time.monotonic() + START_S
        while selector.get_map():
            if until_ready and all(place.ready or not place.rest for place in places):
                return
            for key, _ in selector.select(deadline - time.monotonic() if until_ready else 1.0):
                self._hear(selector, key.fileobj, key.data, places)
            if not until_ready:
                self._give_up_silent(places)
            if until_ready and time.monotonic() > deadline:
                for place in places:
                    if not place.ready:
                        self._drop(place, f"it did not start within {START_S:g} s")
                return

    def _give_up_silent(self, places: list[Place]) -> None:
        # Who feeds one that stands still notices, but for the end of the stream, which fits into the kernel's buffers.
        now = time.monotonic()
        for feeder in places:
            for place in feeder.below if feeder.done is not None else []:
                if place.done is None and not place.lost and now - place.heard > self._options.stall:
                    self._drop(place, STANDS_STILL)

    def _drop(self, place: Place, why: str) -> None:
        if place.done is None:
            place.dropped = place.dropped or why
            place.process.kill()

    def _hear(self, selector: selectors.BaseSelector, pipe: Any, place: Place, places: list[Place]) -> None:
        number = pipe.fileno()
        data = os.read(number, 65536)
        *lines, place.rest[number] = (place.rest[number] + data).split(b"\n")
        for line in lines:
            if pipe is place.process.stderr:
                place.last_words = line.decode(errors="replace").removeprefix("bpsh: ").removeprefix(place.name())
            else:
                self._take(place, json.loads(line), places)
        if not data:
            selector.unregister(pipe)
            pipe.close()
            del place.rest[number]
            if not place.rest and place.done is None:
                # Its children are to know at once, and not when they are tired of waiting.
                for child in place.below:
                    if child.done is None and not child.lost:
                        child.lost = "its feed was lost"
                        child.process.kill()

    def _take(self, place: Place, said: dict[str, Any], places: list[Place]) -> None:
        place.heard = time.monotonic()
        if "port" in said or "ready" in said:
            place.port, place.ready = said.get("port", 0), True
        elif "error" in said:
            self._complain(f"{place.name()}{said['error']}")
        elif "dropped" in said:
            self._drop(places[said["dropped"]], said["why"])
        elif "lost" in said:
            place.lost = said["lost"]
        elif "done" in said:
            place.done = said["done"]
            for child in place.below:
                child.heard = place.heard
            self._finished += place is not places[0]
        self._total = said.get("total", self._total)
        self._sent = said.get("sent", self._sent)
        self._progress(self._sent, self._total, self._finished)

    def _give_orders(self, places: list[Place], sources: list[str], suffix: str) -> None:
        present = [0] + [i for i in range(1, len(places)) if places[i].ready]
        tokens = {i: secrets.token_hex(32) for i in present}
        for rank, i in enumerate(present):
            children = present[below(rank, FANOUT)]
            places[i].below = [places[j] for j in children]
            addressed = [(j, self._address(places[j].node), places[j].port, tokens[j]) for j in children]
            orders = {**self._options.__dict__, "children": addressed, "token": tokens[i]}
            if i == 0:
                orders |= {"sources": sources, "suffix": suffix}
            stdin = places[i].process.stdin
            assert stdin is not None
            try:
                stdin.write(json.dumps(orders).encode() + b"\n")
                stdin.close()
            except BrokenPipeError:
                pass  # it has ended: that is heard of
