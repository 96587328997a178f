"""A soak: random moves, forks, signals, stops, checkpoints, ends, losses of nodes, deaths of slaves and of the master,
and a check that nothing is lost or doubled.

`python -m tests.cluster.soak --seconds 600 [--seed N] [--no-forks]` by hand; a short form runs in the suite. Several
drivers act at once, each on jobs of its own. A job counts on a pipe; every number has to come once, in order, and its
status has to be the one that fits what was done to it; it waits for each of its children once. A job or a child may end
as killed only when a node where it was or was moving was lost, or when the master died while it was moving.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.virtual import DEADLINE, VirtualCluster, bpcluster, cluster, kill, wait_until

NODES = 4
LEASE = 30.0  # seconds, as bpcluster has it
DRIVERS = 3
JOBS = 3  # a driver
HARMLESS = (errno.EBUSY, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.EIO, errno.ECONNRESET)  # while nodes come and go
NO_TREE = (errno.ENOTCONN, errno.ENOENT, errno.ESRCH, errno.ECONNABORTED)  # and while there is no master

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
    pid = os.fork()
    if not pid:
        os.closerange(0, 3)
        time.sleep(float(seconds))
        os._exit(int(code))
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

    def __init__(self, it: VirtualCluster, rng: random.Random) -> None:
        self.it = it
        self.code = rng.randrange(1, 100)
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, str(self.code), str(rng.choice([0, 0, 3]))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            process_group=0,  # SIGTSTP means nothing to a group that is orphaned, as ours may be
        )  # fmt: skip
        self.pid = self.process.pid
        self.places = {-1}  # where it is or, while and after a move, may be
        self.sent = 0
        self.children: dict[int, Child] = {}
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

    def wait(self, what, sentence: str) -> None:
        """Waits for something of a job that lives; returns at once when it has ended."""
        end = time.monotonic() + DEADLINE
        while not what() and self.process.poll() is None:
            if time.monotonic() > end:
                raise Wrong(f"{self}: {sentence}")
            time.sleep(0.005)

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
        child = self.children[pid] = Child(pid, code, set(self.places), self.torn)
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
        assert self.process.stderr is not None and self.process.stdin is not None
        said = self.process.stderr.read()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                stream.close()
        numbers = [line.split() for line in self.lines if line and line[0].isdigit()]
        if said or [int(number[0]) for number in numbers] != list(range(1, len(numbers) + 1)):
            raise Wrong(f"{self}: lines were lost or doubled, or it complained: {said}")
        if {number[1] for number in numbers} != {str(self.pid)}:
            raise Wrong(f"{self}: it had several pids")
        waited = [(int(pid), int(status)) for pid, status in self.told("child")]
        missing = len(waited) != len(self.children) and self.process.returncode == self.code
        if len(dict(waited)) != len(waited) or missing:
            raise Wrong(f"{self}: has waited for {waited}, and had {list(self.children)}")
        for pid, status in waited:
            if not self.children[pid].may_end(status, lost):
                raise Wrong(f"{self}: {self.children[pid]} ended with {status}")

    def __str__(self) -> str:
        heard = f"{self.heard()} of {self.sent} signals"
        if left := self.children.keys() - {int(pid) for pid, _ in self.told("child")}:
            heard += f", children {[self.children[pid] for pid in sorted(left)]}"
        return f"job {self.pid} at {sorted(self.places)}, status {self.process.poll()}, {heard}"


class Soak:
    """All of it."""

    def __init__(self, it: VirtualCluster, seed: int, folder: Path, forks: bool) -> None:
        self.it, self.seed, self.folder = it, seed, folder
        self.actions = {act: weight for act, weight in ACTIONS.items() if forks or act is not Soak.fork}
        self.lost: list[tuple[float, int]] = []
        self.crashes = self.restarts = 0
        self.counts: dict[str, int] = {}
        self.wrong: list[str] = []
        self._lock = threading.Lock()
        self._losing = threading.Lock()

    def run(self, seconds: float) -> None:
        """Drives until the time is over. Raises Wrong."""
        end = time.monotonic() + seconds
        drivers = [
            threading.Thread(target=self._drive, args=(random.Random(self.seed * 100 + i), end)) for i in range(DRIVERS)
        ]
        for driver in drivers:
            driver.start()
        for driver in drivers:
            driver.join()
        if self.wrong:
            raise Wrong(f"seed {self.seed}: " + "; ".join(self.wrong))

    def _drive(self, rng: random.Random, end: float) -> None:
        jobs: list[Job] = []
        try:
            while time.monotonic() < end and not self.wrong:
                while len(jobs) < JOBS:
                    jobs.append(Job(self.it, rng))
                job = rng.choice(jobs)
                act = rng.choices(list(self.actions), weights=list(self.actions.values()))[0]
                with self._lock:
                    self.counts[act.__name__] = self.counts.get(act.__name__, 0) + 1
                act(self, job, rng)
                if job.ended:
                    jobs.remove(job)
                    self._account(job)
            for job in jobs:
                self.finish(job, rng)
                self._account(job)
        except Exception as error:
            self.wrong.append(f"{type(error).__name__}: {error}")
        finally:
            for job in jobs:
                job.process.kill()

    def _account(self, job: Job) -> None:
        expected = getattr(job, "expected", None)
        status = job.process.wait()
        was_lost = job.torn or any(node in job.places for _, node in self.lost)
        if status != expected and not (status == -signal.SIGKILL and was_lost):
            raise Wrong(f"{job}: expected {expected}")
        job.close({node for _, node in self.lost})

    # -- what can be done to a job ---------------------------------------------------------------------------

    def move(self, job: Job, rng: random.Random) -> None:
        """To any place."""
        node = rng.randrange(-1, NODES)
        job.places.add(node)
        crashes = self.crashes
        try:
            with open(self.it.mount / f"nodes/{node}/migrate", "w") as file:
                file.write(f"{job.pid}\n")
        except OSError as error:
            job.torn = job.torn or self.crashes != crashes
            known = error.errno in HARMLESS or (self.crashes and error.errno in NO_TREE)
            if not known and not (error.errno == errno.ESRCH and self._may_be_dead(job)):
                raise Wrong(f"{job} to {node}: {error}") from error
        else:
            job.places, job.torn = {node}, False
        job.steps()

    def _may_be_dead(self, job: Job) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.process.wait(DEADLINE)
        return job.ended

    def fork(self, job: Job, rng: random.Random) -> None:
        """It has a child, which may be moved or killed, and waits for it."""
        child = job.fork(rng.randrange(1, 100), round(rng.random(), 3))
        if child is None:
            return
        match rng.randrange(3):
            case 0:
                self._move_child(child, rng.randrange(-1, NODES))
            case 1:
                child.killed = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGTERM)
        job.steps()

    def _move_child(self, child: Child, node: int) -> None:
        child.places.add(node)
        crashes = self.crashes
        try:
            with open(self.it.mount / f"nodes/{node}/migrate", "w") as file:
                file.write(f"{child.pid}\n")
        except OSError as error:
            child.torn = child.torn or self.crashes != crashes
            if error.errno != errno.ESRCH and error.errno not in (*HARMLESS, *(NO_TREE if self.crashes else ())):
                raise Wrong(f"{child} to {node}: {error}") from error
        else:
            child.places = {node}

    def hear(self, job: Job, rng: random.Random) -> None:
        """A signal reaches it, once."""
        job.sent += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.pid, signal.SIGUSR1)
        job.wait(lambda: job.heard() >= job.sent, f"signal {job.sent} does not arrive")
        if self.crashes or self.restarts:  # it may come twice, in that very moment
            job.sent = max(job.sent, job.heard())
        elif job.heard() > job.sent:
            raise Wrong(f"{job}: a signal came twice")

    def stop(self, job: Job, rng: random.Random) -> None:
        """It stops, may be moved, and goes on."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.pid, rng.choice([signal.SIGSTOP, signal.SIGTSTP]))
        job.wait(lambda: _state(job.pid) in "TZX", "it does not stop")
        time.sleep(rng.random() * 0.05)
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.pid, signal.SIGCONT)
        job.steps()

    def checkpoint(self, job: Job, rng: random.Random) -> None:
        """An image is taken, and it goes on."""
        path = self.folder / f"ck.{job.pid}"
        parent = len(job.told("child")) < len(job.children)  # a checkpoint has no room for children
        try:
            with open(self.it.mount / f"procs/{job.pid}/checkpoint", "w") as file:
                file.write(f"{path}\n")
        except OSError as error:
            refused = parent and error.errno == errno.EOPNOTSUPP
            excused = self.lost or self.crashes or self.restarts or error.errno == errno.EBUSY
            if not refused and not (excused and error.errno in (*HARMLESS, *NO_TREE)):
                raise Wrong(f"{job}: checkpoint: {error}") from error
        path.unlink(missing_ok=True)
        job.steps()

    def finish(self, job: Job, rng: random.Random) -> None:
        """It ends by itself."""
        job.expected = job.code
        job.tell("end")
        job.wait(lambda: False, "it does not end")

    def kill(self, job: Job, rng: random.Random) -> None:
        """It is killed."""
        signo = rng.choice([signal.SIGKILL, signal.SIGTERM])
        job.expected = -signo
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.pid, signo)
        job.wait(lambda: False, "it does not die")

    def lose(self, job: Job, rng: random.Random) -> None:
        """A node dies, with its jobs."""
        if not self._losing.acquire(blocking=False):
            return
        try:
            node = rng.randrange(NODES)
            slave = self.it.slave(node)
            if slave:
                self.lost.append((time.monotonic(), node))
                with contextlib.suppress(ProcessLookupError):
                    self.it.lose(node)
            wait_until(lambda: self.it.slave(node) not in (0, slave), f"node {node} does not start afresh")
            self.it.wait_state(node, "up")
        finally:
            self._losing.release()

    def restart(self, job: Job, rng: random.Random) -> None:
        """The slave of a node dies, and the next one takes up its jobs."""
        if not self._losing.acquire(blocking=False):
            return
        try:
            node = rng.randrange(NODES)
            slave = self.it.slave(node)
            self.restarts += 1
            if slave:
                with contextlib.suppress(ProcessLookupError):
                    kill(slave)
            wait_until(lambda: self.it.slave(node) not in (0, slave), f"no other slave of node {node} comes")
            self.it.wait_state(node, "up")
        finally:
            self._losing.release()

    def crash(self, job: Job, rng: random.Random) -> None:
        """The master's daemon dies, and the next one comes."""
        if not self._losing.acquire(blocking=False):
            return
        try:
            self.crashes += 1
            began = time.monotonic()
            kill(self.it.pid("master"))
            done = bpcluster("restart-master", mount=self.it.mount)
            if done.returncode:
                raise Wrong(f"no master: {done.stderr}")
            for node in range(NODES):
                wait_until(
                    lambda node=node: (self.it.mount / f"nodes/{node}").exists(), f"node {node} does not come back"
                )
                self.it.wait_state(node, "up")
            if time.monotonic() - began > LEASE:  # on a machine that has too much to do: nodes may not have waited
                self.lost += [(began, node) for node in range(NODES)]
        finally:
            self._losing.release()

    def look(self, job: Job, rng: random.Random) -> None:
        """Its files can be read."""
        for name in ("state", "node", "history", "rusage", "cmdline"):
            try:
                (self.it.mount / f"procs/{job.pid}/{name}").read_bytes()
            except OSError as error:
                if not (self.lost or self.crashes or self.restarts) or error.errno not in (*HARMLESS, *NO_TREE):
                    raise Wrong(f"{job}: {name}: {error}") from error


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


ACTIONS = {
    Soak.move: 60, Soak.fork: 12, Soak.hear: 12, Soak.stop: 8, Soak.look: 6, Soak.checkpoint: 5, Soak.finish: 4,
    Soak.kill: 4, Soak.lose: 1, Soak.crash: 1, Soak.restart: 1,
}  # fmt: skip


def soak(mount: Path, seconds: float, seed: int, forks: bool = True) -> dict[str, int]:
    """Runs one; how often each thing was done. Raises Wrong, with the seed.

    Args:
        forks: jobs have children.
    """
    print(f"soak: seed {seed}", flush=True)
    with cluster(mount, "--lease", str(LEASE), nodes=NODES) as it, tempfile.TemporaryDirectory() as folder:
        one = Soak(it, seed, Path(folder), forks)
        one.run(seconds)
        for role in ("master", *(f"n{node}" for node in range(NODES))):
            if "Traceback" in it.log(role):
                raise Wrong(f"seed {seed}: the log of {role} has a traceback")
    return one.counts


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--forks", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bpfs-soak-") as folder:
        print(soak(Path(folder) / "m", arguments.seconds, arguments.seed, arguments.forks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
