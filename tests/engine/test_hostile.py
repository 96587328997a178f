"""What a worker is told by others is never believed: a move is refused then, and nothing is left over."""

import contextlib
import io
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from engine import dump
from engine import image as img
from engine.freeze import freeze
from engine.jobspace import JobSpace
from tests.engine.moves import Mover, Refused, Victim, Worker

PID = 104_000
NONSENSE: list[Any] = [None, [[]], b"\xff" * 40]


@pytest.fixture
def parts(victim: Callable[..., Victim]) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """META and STATE of a process, and what comes after them."""
    frozen = freeze(victim("memory").pid)
    try:
        seen = dump.inspect(frozen)
        image = dump.build(seen)
        image.pid = image.threads[0].tid = PID
        rest = io.BytesIO()
        dump.write(seen, image, rest.write)
    finally:
        frozen.release()
    read = io.BytesIO(rest.getvalue())
    meta, state = (
        msgpack.unpackb(img.read_frame(read.read, (kind,), img.MAX_META)[1], strict_map_key=False)
        for kind in (img.META, img.STATE)
    )
    return meta, state, read.read()


@contextlib.contextmanager
def sending(destination: Worker, space: JobSpace, data: bytes) -> Iterator[None]:
    """A source that says this."""
    ready = destination.ask(
        "prepare", place={"init": space.init}, address="127.0.0.1", pid=PID, ppid=1, pgid=PID, sid=PID
    )
    with socket.create_connection(("127.0.0.1", ready["port"])) as sock:
        destination.start("receive", externals={}, timeout_s=30, lends=True)
        with contextlib.suppress(OSError):  # it has closed the connection already
            sock.sendall(ready["token"] + data)
            sock.shutdown(socket.SHUT_WR)
        yield


def head(meta: dict[str, Any], state: dict[str, Any]) -> bytes:
    """META and STATE, with right checksums."""
    return img.frame(img.META, msgpack.packb(meta)) + img.frame(img.STATE, msgpack.packb(state))


def spoilt(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each field in turn is nonsense, and then the first of what it is made of."""
    for name, value in fields.items():
        for bad in NONSENSE:
            yield {**fields, name: bad}
        if value and type(value) is list:
            for bad in NONSENSE:
                yield {**fields, name: [bad, *value[1:]]}


def test_a_spoilt_image_is_refused_and_leaves_nothing(
    mover: Mover, space: JobSpace, parts: tuple[dict[str, Any], dict[str, Any], bytes]
) -> None:
    meta, state, rest = parts
    destination = mover.worker()
    for data in [*(head(bad, state) for bad in spoilt(meta)), *(head(meta, bad) for bad in spoilt(state))]:
        with sending(destination, space, data + rest):
            try:
                destination.finish()
            except Refused as refusal:
                assert refusal.text
            else:  # it can live with that
                destination.ask("discard")
        assert _is_gone(space)
        space.read_reports()  # nodeinit waits for a reader when there are many
    with sending(destination, space, head(meta, state) + rest):  # the same worker makes the true one
        destination.finish()


def test_a_name_that_is_no_utf8_is_told_to_who_asked(mover: Mover) -> None:
    worker, name = mover.worker(), os.fsdecode(b"/no/\xff")
    with pytest.raises(Refused, match=name):
        worker.ask("load", path=name, uid=0, gid=0, limits_of=os.getpid())
    assert worker.ask("hello")


def test_a_worker_outlives_what_nobody_foresaw(mover: Mover) -> None:
    worker = mover.worker()  # its log, pytest's, is a closed file
    with pytest.raises(Refused, match="invalid literal"):
        worker.ask("load", path="/no", uid="nobody", gid=0, limits_of=os.getpid())
    assert worker.ask("hello")


def _is_gone(space: JobSpace) -> bool:
    try:
        stat = Path(f"/proc/{space.init}/root/proc/{PID}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(") ")[2][0] in "ZX"
