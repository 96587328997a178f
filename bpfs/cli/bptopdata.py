# SPDX-License-Identifier: GPL-2.0-or-later
"""What bptop shows: the processes of the cluster with what they use, sampled in the background.

A process on a node is read from /bpfs/procs/PID/stat, in the kernel's format; one on the master from /proc.
"""

from __future__ import annotations

import os
import pwd
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Event, Thread

from bpfs.client import MASTER, Cluster

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_READERS = 8
"""Files that are read at a time: a silent node keeps one waiting for seconds, and not all."""

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Row:
    """One process.

    Attributes:
        node: where it is; MASTER, or None on its way.
        state: the kernel's letter, or `?` where its node did not tell.
        seconds: of processor time.
        percent: of one processor, since the sample before.
        kilobytes: of memory that is resident.
    """

    pid: int
    user: str
    node: int | None
    state: str
    seconds: float
    percent: float
    kilobytes: int
    threads: int
    command: str


@dataclass(frozen=True, slots=True)
class View:
    """One look at the cluster."""

    when: float
    rows: tuple[Row, ...] = ()
    up: int = 0
    nodes: int = 0
    loads: tuple[tuple[int, str], ...] = ()
    trouble: str = ""


@lru_cache
def user_name(uid: int) -> str:
    """A user's name, or number where he has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class Sampler:
    """Looks at the cluster, each time comparing with the time before."""

    def __init__(self, cluster: Cluster, *, everything: bool, nodes: frozenset[int] | None) -> None:
        """Args:
        everything: processes of the master as well.
        nodes: only what is on these.
        """
        self._cluster = cluster
        self.everything = everything
        self._nodes = nodes
        self._before: dict[int, tuple[float, float]] = {}
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="bptop")

    def look(self) -> View:
        """Returns how things are now.

        Raises:
            OSError: there is no cluster any more.
        """
        status = self._cluster.status()
        up = [node.number for node in status if node.state == "up"]
        away = list(self._cluster.procs)
        found = list(self._pool.map(self._remote, away))
        if self.everything:
            gone = set(away)
            found += [self._local(int(name)) for name in os.listdir(PROC) if name.isdigit() and int(name) not in gone]
        rows = tuple(row for row in found if row and (self._nodes is None or row.node in self._nodes))
        self._before = {pid: seen for pid, seen in self._before.items() if pid in {row.pid for row in rows}}
        return View(time.time(), rows, len(up), len(status), tuple(self._pool.map(self._load, up)))

    def _load(self, number: int) -> tuple[int, str]:
        try:
            return number, self._cluster.nodes[number].read("load").split()[0]
        except (OSError, KeyError, IndexError):
            return number, "?"

    def _remote(self, pid: int) -> Row | None:
        folder = self._cluster.mount / "procs" / str(pid)
        try:
            place = (folder / "node").read_text().strip()
            node = None if place == "migrating" else int(place)
            try:
                stat = (folder / "stat").read_bytes()
            except TimeoutError:
                stat = b""  # a silent node: what is known of it is shown all the same
            return self._row(pid, folder, stat, node)
        except (OSError, ValueError, IndexError):
            return None  # it has ended meanwhile

    def _local(self, pid: int) -> Row | None:
        try:
            return self._row(pid, PROC / str(pid), (PROC / str(pid) / "stat").read_bytes(), MASTER)
        except (OSError, ValueError, IndexError):
            return None

    def _row(self, pid: int, folder: Path, stat: bytes, node: int | None) -> Row:
        head, _, tail = stat.decode(errors="replace").rpartition(")")
        fields = tail.split() or ["?", *["0"] * 24]  # from field 3 of proc(5) on
        words = (folder / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        command = " ".join(words) or f"[{head.partition('(')[2]}]"
        seconds, now = (int(fields[11]) + int(fields[12])) / _TICK, time.monotonic()
        old, then = self._before.get(pid, (seconds, now))
        self._before[pid] = seconds, now
        percent = max(0.0, seconds - old) / (now - then) * 100 if now > then else 0.0
        user = user_name(folder.stat().st_uid)
        memory = int(fields[21]) * _PAGE // 1024
        return Row(pid, user, node, fields[0], seconds, percent, memory, int(fields[17]), command)


class Watcher:
    """Samples in a thread of its own, so that the screen answers while a node does not."""

    def __init__(self, sampler: Sampler, delay: float) -> None:
        self.sampler = sampler
        self.view = View(time.time())
        self._delay = delay
        self._now = Event()
        Thread(target=self._run, name="sampler", daemon=True).start()

    def hurry(self) -> None:
        """Looks again at once."""
        self._now.set()

    def _run(self) -> None:
        while True:
            try:
                self.view = self.sampler.look()
            except OSError as error:
                self.view = View(time.time(), trouble=str(error))
            self._now.wait(self._delay)
            self._now.clear()
