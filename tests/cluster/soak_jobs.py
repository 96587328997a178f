"""The jobs of the soak, what is known of each, and the diary of what was done to them."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.cluster.virtual import DEADLINE

LAST_MOMENTS = 300  # lines

# Counts on stdout, a line a step, and tells of SIGUSR1. Told so on stdin, it forks a child, which ends with a code
# after some seconds, and tells of its end; or it ends itself with `code`.
JOB = """
import os, select, signal, sys, threading, time
code, threads = int(sys.argv[1]), int(sys.argv[2])
heard, told, n, living, ballast = 0, 0, 0, set(), bytearray(os.urandom(1 << 16)) * 8
def hear(*_):
    global heard
    heard += 1
signal.signal(signal.SIGUSR1, hear)
total = sum(ballast)
for _ in range(threads):
    threading.Thread(target=lambda: [time.sleep(0.01) for _ in iter(int, 1)], daemon=True).start()
def fork(code, seconds):
    ready, closed = os.pipe()
    pid = os.fork()
    if not pid:
        os.closerange(0, 3)
        os.closerange(ready, closed + 1)
        time.sleep(float(seconds))
        os._exit(int(code))
    os.close(closed)
    os.read(ready, 1)  # what it shares with its parent could not move
    os.close(ready)
    living.add(pid)
    print("forked", pid, flush=True)
def reap(how):
    pid, status = os.waitpid(-1, how)
    if pid:
        living.remove(pid)
        print("child", pid, os.waitstatus_to_exitcode(status), flush=True)
while True:
    if select.select([0], [], [], 0.004)[0]:
        word, *rest = os.read(0, 99).decode().split()
        if word == "end":
            break
        fork(*rest)
    if living:
        reap(os.WNOHANG)
    n += 1
    print(n, os.getpid(), flush=True)
    if told != heard:
        told = heard
        print("heard", told, flush=True)
    assert n % 50 or sum(ballast) == total, "memory is damaged"
while living:
    reap(0)
print("end", n, flush=True)
sys.exit(code)
"""


class Wrong(AssertionError):
    """Something that must not happen has happened."""


class Diary:
    """What was done, and what the master told of it, in order."""

    def __init__(self, events: Path) -> None:
        self._events = events
        self._lines: list[str] = []
        self._ended = threading.Event()
        self._following = threading.Thread(target=self._follow, daemon=True)
        self._following.start()

    def note(self, what: str) -> None:
        """Enters a line, with the time."""
        now = time.time()
        self._lines.append(f"{time.strftime('%H:%M:%S', time.localtime(now))}.{int(now * 1000) % 1000:03d} {what}")

    def about(self, pids: Iterable[int]) -> list[str]:
        """The lines that name one of these processes, and those of nodes and daemons; and all of the last moments."""
        wanted = re.compile(rf"\b(node \d+ state|lose|crash of|restart of|{'|'.join(map(str, pids))})\b")
        before = len(self._lines) - LAST_MOMENTS
        return [line for number, line in enumerate(self._lines) if number > before or wanted.search(line)]

    def _follow(self) -> None:
        while not self._ended.wait(0.01):  # there may be no master just now
            with contextlib.suppress(OSError), open(self._events) as file:
                for line in file:
                    self.note(f"    {line.strip()}")

    def close(self) -> None:
        """Follows no more, once the mount is gone."""
        self._ended.set()
        self._following.join(DEADLINE)


@dataclass
class Child:
    """What a job has forked."""

    pid: int
    code: int
    places: set[int]  # as a job's
    torn: bool = False
    killed: bool = False

    def may_end(self, status: int, lost: set[int]) -> bool:
        """Whether this is an end that it may have come to."""
        was_lost = self.torn or bool(self.places & lost)
        return status == self.code or (self.killed and status == -signal.SIGTERM) or (was_lost and status == -9)


class Job:
    """One process and what is known of it."""

    def __init__(self, diary: Diary, rng: random.Random) -> None:
        self._diary = diary
        self.code = rng.randrange(1, 100)
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, str(self.code), str(rng.choice([0, 0, 3]))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            process_group=0,  # SIGTSTP means nothing to a group that is orphaned, as ours may be
        )  # fmt: skip
        self.pid = self.process.pid
        self.places = {-1}  # where it is or, while and after a move, may be
        self.sent = 0
        self.children: list[Child] = []
        self.torn = False  # the master has died while it was moving
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.wait(lambda: self.lines, "it does not begin")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):  # else it was killed in the middle of it
                self.lines.append(line.strip())
                if not line[0].isdigit():
                    self._diary.note(f"  job {self.pid} says: {line.strip()}")

    def wait(self, what, sentence: str) -> None:
        """Waits for something of a job that lives; returns at once when it has ended."""
        end = time.monotonic() + DEADLINE
        while not what() and self.process.poll() is None:
            if time.monotonic() > end:
                raise Wrong(f"{self}: {sentence}")
            time.sleep(0.005)

    @cached_property
    def complaint(self) -> str:
        """What it, having ended, has said on stderr."""
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            return stderr.read()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def heard(self) -> int:
        """How many signals it has told of."""
        return next((int(line.split()[1]) for line in reversed(self.lines) if line.startswith("heard")), 0)

    def fork(self, code: int, seconds: float) -> Child | None:
        """A child that it has now; None where it has ended."""
        before = len(self.told("forked"))
        self.tell(f"fork {code} {seconds}")
        self.wait(lambda: len(self.told("forked")) > before, "it does not fork")
        if len(self.told("forked")) == before:
            return None
        pid = int(self.told("forked")[-1][0])
        self.children.append(child := Child(pid, code, set(self.places), self.torn))
        return child

    def told(self, word: str) -> list[list[str]]:
        """The rest of its lines that begin so."""
        return [line.split()[1:] for line in self.lines if line.startswith(word)]

    def tell(self, line: str) -> None:
        """It reads this, unless it has ended."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def steps(self) -> None:
        """It goes on."""
        before = len(self.lines)
        self.wait(lambda: len(self.lines) > before + 2, f"it stands still after {self.lines[-2:]}")

    def close(self, lost: set[int]) -> None:
        """All of its output is there: check every line.

        Args:
            lost: nodes that have been.
        """
        self._reader.join(DEADLINE)
        assert self.process.stdin is not None
        said = self.complaint
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()
        numbers = [line.split() for line in self.lines if line and line[0].isdigit()]
        if said or [int(number[0]) for number in numbers] != list(range(1, len(numbers) + 1)):
            raise Wrong(f"{self}: lines were lost or doubled, or it complained: {said}")
        if {number[1] for number in numbers} != {str(self.pid)}:
            raise Wrong(f"{self}: it had several pids")
        left = list(self.children)  # a pid is given away again, by a node that was lost, when it has been waited for
        for pid, status in self._waited():
            child = next((child for child in left if child.pid == pid), None)
            if child is None or not child.may_end(status, lost):
                raise Wrong(f"{self}: {child or pid} ended with {status}")
            left.remove(child)
        if left and self.process.returncode == self.code:
            raise Wrong(f"{self}: has not waited for all its children")

    def _waited(self) -> list[tuple[int, int]]:
        """The pids and statuses of the children that it has waited for."""
        return [(int(pid), int(status)) for pid, status in self.told("child")]

    def __str__(self) -> str:
        heard = f"{self.heard()} of {self.sent} signals"
        if self.children:
            heard += f", children {self.children}, waited for {self._waited()}"
        return f"job {self.pid} at {sorted(self.places)}, status {self.process.poll()}, {heard}"
