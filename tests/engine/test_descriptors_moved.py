"""Every kind of descriptor through a whole move: two workers, an image over TCP, a process in a job namespace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import pytest

from engine.jobspace import JobSpace
from engine.zygote import Zygote
from tests.engine.births import Reports
from tests.engine.test_descriptors import MOVED, SCRIPT

ENDS = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def space() -> Iterator[JobSpace]:
    made = JobSpace.start(range(100000, 110000))
    yield made
    made.close()


def send(worker: socket.socket, op: str, **more: Any) -> None:
    worker.send(msgpack.packb({"op": op, **more}))


def answer(worker: socket.socket) -> dict[str, Any]:
    worker.settimeout(60)
    result: dict[str, Any] = msgpack.unpackb(worker.recv(1 << 20))
    assert result["ok"], result
    return result


def ask(worker: socket.socket, op: str, **more: Any) -> dict[str, Any]:
    send(worker, op, **more)
    return answer(worker)


def move(zygote: Zygote, space: JobSpace, process: subprocess.Popen[bytes]) -> None:
    with closing(zygote.worker()) as source, closing(zygote.worker()) as destination:
        ask(source, "freeze", pid=process.pid)
        found = ask(source, "inspect")
        assert found["refusals"] == [] and found["externals"] == []
        ids = {"pid": process.pid, **{key: found["process"][key] for key in ("ppid", "pgid", "sid", "uid")}}
        ready = ask(destination, "prepare", **ids, place={"init": space.init}, address="127.0.0.1")
        send(source, "send", host="127.0.0.1", port=ready["port"], token=ready["token"])
        ask(destination, "receive", externals={}, timeout_s=60)
        answer(source)
        ask(source, "vanish")
        process.wait()
        ask(destination, "resume")


@pytest.mark.parametrize("kind", MOVED)
def test_kind_moves(kind: str, zygote: Zygote, space: JobSpace, tmp_path: Path) -> None:
    work, log = tmp_path / "work", tmp_path / "log"
    work.mkdir()
    reports = Reports(space)
    with (
        open(log, "w") as out,
        subprocess.Popen(
            [sys.executable, str(SCRIPT), kind, str(work)], stdin=subprocess.DEVNULL, stdout=out, stderr=out
        ) as process,
    ):
        try:
            os.waitpid(process.pid, os.WUNTRACED)
            move(zygote, space, process)
        finally:
            process.kill()
    space.signal(process.pid, signal.SIGCONT)  # it was stopped, and still is
    end = reports.wait("the victim's end", lambda report: report.pid == process.pid and report.code in ENDS)
    assert (end.code, end.status) == (os.CLD_EXITED, 0), log.read_text()
    assert space.processes() == []
    space.drop_unneeded_placeholders()
