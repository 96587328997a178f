# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine alone, without daemons: moves between two workers over TCP, and many restores of one image."""

from __future__ import annotations

import io
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine import dump
from engine import image as img
from engine.freeze import Frozen, freeze
from engine.jobspace import JobSpace
from engine.onexec import Armed
from engine.restarting import renumber
from engine.restore import Builder
from engine.target import place_child
from engine.zygote import Zygote
from tests.benchmarks.frame import Row
from tests.benchmarks.subject import MB, folder_with_subject, into_fresh_memory, other_process, tcp_copy
from tests.engine.moves import Worker, until

ROUNDS = 40
RESTORES = 64
BLOCK = range(100_000, 200_000)
Times = tuple[float, float]  # seconds: until it runs, of which it stood still


@contextmanager
def process(*command: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process with pipes as its stdio; killed in the end."""
    with subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as one:
        try:
            yield one
        finally:
            one.kill()


@contextmanager
def subject(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with 1 MB of memory of its own, ready."""
    with process(folder / "subject", MB) as one:
        assert one.stdout is not None and one.stdout.readline() == b"ready\n"
        yield one


@contextmanager
def about_to_exec(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that becomes the subject when a line comes."""
    with process("sh", "-c", f"echo; read line; exec {folder}/subject 0") as one:
        assert one.stdout is not None and one.stdout.readline() == b"\n"
        yield one


def run_to_exec(one: subprocess.Popen[bytes]) -> None:
    """Lets it come to its exec."""
    assert one.stdin is not None
    one.stdin.write(b"\n")


class Moves:
    """Moves into a job namespace by two workers."""

    def __init__(self, zygote: Zygote, space: JobSpace) -> None:
        self._zygote = zygote
        self._space = space
        self._stdio, self._other_end = socket.socketpair()

    def running(self, folder: Path) -> Times:
        """The move of a process that runs; everything but the destination's preparation is done while it stands."""
        with subject(folder) as one:
            source, destination = Worker(self._zygote), Worker(self._zygote)
            began = time.perf_counter()
            ready = self._prepare(destination, one.pid)
            frozen = time.perf_counter()
            seen = source.ask("freeze", pid=one.pid, inspect=True, moving=True)
            return self._carry_on(source, destination, seen, ready, began, frozen)

    def at_exec(self, folder: Path) -> Times:
        """The same at its exec stop: from the stop on."""
        with about_to_exec(folder) as one:
            source, destination = Worker(self._zygote), Worker(self._zygote)
            source.ask("arm", pid=one.pid)
            ready = self._prepare(destination, one.pid)
            source.start("wait_exec")
            run_to_exec(one)
            source.finish()
            began = time.perf_counter()
            return self._carry_on(source, destination, source.ask("inspect", moving=True), ready, began, began)

    def _prepare(self, destination: Worker, pid: int) -> dict[str, object]:
        place, ids = {"init": self._space.init}, {"pid": pid, "ppid": 1, "pgid": pid, "sid": pid}
        return destination.ask("prepare", place=place, address="127.0.0.1", **ids)

    def _carry_on(
        self, source: Worker, destination: Worker, seen: dict[str, object], ready: dict[str, object], began: float,
        frozen: float,
    ) -> Times:  # fmt: skip
        assert not seen["refusals"], seen["refusals"]
        externals = {external["key"]: 0 for external in seen["externals"]}  # type: ignore[attr-defined]
        destination.start("receive", [self._stdio.fileno()], externals=externals, timeout_s=30)
        source.ask("send", host="127.0.0.1", port=ready["port"], token=ready["token"])
        destination.finish()
        source.start("vanish", go=True)
        assert destination.ask("follow")["running"]
        done = time.perf_counter()
        source.finish()
        for worker in (source, destination):
            worker.sock.close()
        clear(self._space)
        return done - began, done - frozen

    def close(self) -> None:
        """Closes the stdio of all that was moved."""
        self._stdio.close()
        self._other_end.close()


def clear(space: JobSpace) -> None:
    """Ends all jobs."""
    space.kill_all()
    proc = Path(f"/proc/{space.init}/root/proc")
    until(lambda: [p.name for p in proc.iterdir() if p.name.isdigit()] == ["1"], "the end of all jobs")
    space.read_reports()


def written(frozen: Frozen) -> tuple[img.Image, bytes]:
    """The image of a process that stands still, and its pages; it goes on."""
    try:
        inspection = dump.inspect(frozen)
        image, parts = dump.build(inspection), list[bytes]()
        dump.write(inspection, image, lambda data: parts.append(bytes(data)))
    finally:
        frozen.release()
    return image, b"".join(parts[2:-1])  # without META, STATE and END


def running_image(folder: Path) -> tuple[img.Image, bytes]:
    """Of the 1 MB process."""
    with subject(folder) as one:
        return written(freeze(one.pid))


def exec_image(folder: Path) -> tuple[img.Image, bytes]:
    """Of the same program at its exec stop."""
    control, other_end = socket.socketpair()
    with about_to_exec(folder) as one, control, other_end:
        armed = Armed(one.pid)
        run_to_exec(one)
        return written(armed.wait(control))


def restore_many(space: JobSpace, image: img.Image, pages: bytes) -> float:
    """Seconds for all the restores, one after the other in this very process."""
    head = img.head(image)
    stdio, other_end = socket.socketpair()
    externals = {e["key"]: stdio.fileno() for e in image.descriptors if e["kind"] == "external"}
    with stdio, other_end:
        began = time.perf_counter()
        for pid in range(BLOCK.start + 1000, BLOCK.start + 1000 + RESTORES):
            one = img.read_head(io.BytesIO(head).read)
            renumber(one, pid)
            restore(space, one, pages, externals)
        taken = time.perf_counter() - began
        clear(space)
    return taken


def restore(space: JobSpace, image: img.Image, pages: bytes, externals: dict[int, int]) -> None:
    """One restore; it runs then."""
    target = place_child(space.init, image.pid, 1, image.pid, image.pid)
    builder = Builder(target, image, externals)
    at = 0

    def fill(view: memoryview) -> None:
        nonlocal at
        view[:] = pages[at : at + len(view)]
        at += len(view)

    try:
        builder.begin()
        builder.pages(fill)
        builder.complete()
        builder.resume()
    except BaseException:
        target.discard()
        raise
    finally:
        builder.close()


def rows() -> Iterator[Row]:
    """The table."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))  # as in a worker: see engine.linux.ptrace.wait
    zygote, space = Zygote.start(), JobSpace.start(BLOCK)
    moves = Moves(zygote, space)
    try:
        with folder_with_subject() as folder, other_process(into_fresh_memory) as port:
            copies = [tcp_copy(port, memoryview(bytes(MB))) for _ in range(ROUNDS)]
            plain = statistics.median(copies) * 1e3
            for name, move in (("1 MB", moves.running), ("at the exec stop", moves.at_exec)):
                yield from _move_rows(name, lambda move=move: move(folder), plain)
            for name, make in (("1 MB", running_image), ("exec stop", exec_image)):
                image, pages = make(folder)
                taken = min(restore_many(space, image, pages) for _ in range(5)) * 1e3
                yield Row(f"{RESTORES} restores of one image, {name}, least", taken, "ms", plain * RESTORES, "64 x TCP")
    finally:
        moves.close()
        space.close()
        zygote.close()


def _move_rows(name: str, move: Callable[[], Times], plain: float) -> Iterator[Row]:
    move()
    taken = [move() for _ in range(ROUNDS)]
    for how, of in (("median", statistics.median), ("least", min)):
        total, still = (of(column) * 1e3 for column in zip(*taken, strict=True))
        if total != still:
            yield Row(f"{name}, prepare to running, {how} of {ROUNDS}", total, "ms", plain, "1 MB by plain TCP")
        yield Row(f"{name}, standing still, {how} of {ROUNDS}", still, "ms", plain, "1 MB by plain TCP")
