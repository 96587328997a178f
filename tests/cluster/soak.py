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
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.cluster.soak_jobs import Child, Diary, Job, Wrong
from tests.cluster.virtual import DEADLINE, VirtualCluster, bpcluster, cluster, kill, wait_until

NODES = 4
LEASE = 30.0  # seconds, as bpcluster has it
DRIVERS = 3
JOBS = 3  # a driver
HARMLESS = (errno.EBUSY, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.EIO, errno.ECONNRESET)  # while nodes come and go
NO_TREE = (errno.ENOTCONN, errno.ENOENT, errno.ESRCH, errno.ECONNABORTED)  # and while there is no master


class Soak:
    """All of it."""

    def __init__(self, it: VirtualCluster, seed: int, folder: Path, forks: bool) -> None:
        self.it, self.seed, self.folder = it, seed, folder
        self.actions = {act: weight for act, weight in ACTIONS.items() if forks or act is not Soak.fork}
        self.lost: list[tuple[float, int]] = []
        self.crashes = self.restarts = 0
        self.counts: dict[str, int] = {}
        self.wrong: list[str] = []
        self.diary = Diary(it.mount / "events")
        self._lock = threading.Lock()
        self._losing = threading.Lock()

    def run(self, seconds: float) -> None:
        """Drives until the time is over. Raises Wrong."""
        end = time.monotonic() + seconds
        drivers = [
            threading.Thread(target=self._drive, args=(random.Random(self.seed * 100 + i), end)) for i in range(DRIVERS)
        ]
        threading.Thread(target=self._watch_the_machine, daemon=True).start()
        for driver in drivers:
            driver.start()
        for driver in drivers:
            driver.join()
        if self.wrong:
            raise Wrong(f"seed {self.seed}: " + "; ".join(self.wrong))

    def _watch_the_machine(self) -> None:
        """Where all of it stands still for long, leases of nodes may end, rightly."""
        while True:
            began = time.monotonic()
            time.sleep(0.1)
            if (stood := time.monotonic() - began) > LEASE / 3:
                self.diary.note(f"the machine stood still for {stood:.0f} s: lose all nodes, maybe")
                self.lost += [(began, node) for node in range(NODES)]

    def _drive(self, rng: random.Random, end: float) -> None:
        jobs: list[Job] = []
        try:
            while time.monotonic() < end and not self.wrong:
                while len(jobs) < JOBS:
                    jobs.append(Job(self.diary, rng))
                job = rng.choice(jobs)
                act = rng.choices(list(self.actions), weights=list(self.actions.values()))[0]
                with self._lock:
                    self.counts[act.__name__] = self.counts.get(act.__name__, 0) + 1
                self.diary.note(f"job {job.pid}: {act.__name__}")
                act(self, job, rng)
                if job.ended:
                    self._account(job)
                    jobs.remove(job)
            for job in jobs:
                self.finish(job, rng)
                self._account(job)
        except Exception as error:
            self.wrong.append(f"{type(error).__name__}: {error}")
            self.diary.note(self.wrong[-1])
            family = {job.pid: [child.pid for child in job.children] for job in jobs}
            print("\n".join(self.diary.about([*family, *itertools.chain(*family.values())])), file=sys.stderr)
        finally:
            for job in jobs:
                job.process.kill()

    def _account(self, job: Job) -> None:
        expected = getattr(job, "expected", None)
        status = job.process.wait()
        was_lost = job.torn or any(node in job.places for _, node in self.lost)
        if status != expected and not (status == -signal.SIGKILL and was_lost):
            raise Wrong(f"{job}: expected {expected}; it said: {job.complaint}")
        job.close({node for _, node in self.lost})

    # -- what can be done to a job ---------------------------------------------------------------------------

    def move(self, job: Job, rng: random.Random) -> None:
        """To any place."""
        node = rng.randrange(-1, NODES)
        self.diary.note(f"move of {job.pid} to {node}")
        job.places.add(node)
        crashes = self.crashes
        try:
            with open(self.it.mount / f"nodes/{node}/migrate", "w") as file:
                file.write(f"{job.pid}\n")
        except OSError as error:
            self.diary.note(f"move of {job.pid} to {node}: {error}")
            job.torn = job.torn or self.crashes != crashes
            known = error.errno in HARMLESS or (self.crashes and error.errno in NO_TREE)
            if not known and not (error.errno == errno.ESRCH and self._may_be_dead(job)):
                raise Wrong(f"{job} to {node}: {error}") from error
        else:
            self.diary.note(f"move of {job.pid} to {node} done")
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
        self.diary.note(f"job {job.pid} has child {child.pid}")
        match rng.randrange(3):
            case 0:
                self._move_child(child, rng.randrange(-1, NODES))
            case 1:
                self.diary.note(f"SIGTERM to child {child.pid}")
                child.killed = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGTERM)
        job.steps()

    def _move_child(self, child: Child, node: int) -> None:
        self.diary.note(f"move of child {child.pid} to {node}")
        child.places.add(node)
        crashes = self.crashes
        try:
            with open(self.it.mount / f"nodes/{node}/migrate", "w") as file:
                file.write(f"{child.pid}\n")
        except OSError as error:
            self.diary.note(f"move of child {child.pid} to {node}: {error}")
            child.torn = child.torn or self.crashes != crashes
            if error.errno != errno.ESRCH and error.errno not in (*HARMLESS, *(NO_TREE if self.crashes else ())):
                raise Wrong(f"{child} to {node}: {error}") from error
        else:
            self.diary.note(f"move of child {child.pid} to {node} done")
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
                self.diary.note(f"lose node {node}")
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
            self.diary.note(f"restart of the slave of node {node}")
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
            self.diary.note("crash of the master")
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
    with (
        contextlib.ExitStack() as stack,
        cluster(mount, "--lease", str(LEASE), nodes=NODES) as it,
        tempfile.TemporaryDirectory() as folder,
    ):
        one = Soak(it, seed, Path(folder), forks)
        stack.callback(one.diary.close)
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
