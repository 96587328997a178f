"""Checkpoints with right checksums and wrong contents: an error in words, no process, a worker as good as before."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from engine import image as img
from engine.checkpoint import ABOUT, TABLE, TAIL, Chain, describe
from tests.engine.moves import Mover, Refused, Victim
from tests.engine.test_alone import said
from tests.engine.test_hostile import NONSENSE, spoilt

Fields = dict[str, Any]
_ABOUT = [bytes(16), b"", b"", 1.0, "here"]


def _nothing_beside(name: bytes) -> int:
    raise FileNotFoundError(2, "No such file or directory", os.fsdecode(name))


@pytest.fixture
def fields(victim: Callable[..., Victim], tmp_path: Path) -> tuple[Fields, Fields]:
    """META and STATE of a process that has ended, so that its pid is free."""
    one, file = victim("signals"), tmp_path / "raw"
    said("dump", one.pid, "-o", file, "--kill")
    one.process.wait()
    with file.open("rb") as stream:
        meta, state = (
            msgpack.unpackb(img.read_frame(stream.read, (kind,), img.MAX_META)[1], strict_map_key=False)
            for kind in (img.META, img.STATE)
        )
    return {**meta, "runs": b"", "total": 0}, state


def write(path: Path, meta: Fields, state: Fields, about: object = _ABOUT, table: object = (b"", ())) -> Path:
    """A file of these, with right checksums and no pages."""
    head = b"".join(
        img.frame(kind, msgpack.packb(body)) for kind, body in ((ABOUT, about), (img.META, meta), (img.STATE, state))
    )
    tail = img.frame(TABLE, msgpack.packb(table)) + img.frame(TAIL, struct.pack("<Q", len(head)))
    path.write_bytes(head + tail)
    return path


def nonsense(fields: Fields) -> Iterator[Fields]:
    """As `spoilt`, and each value of a table that is nonsense in turn."""
    yield from spoilt(fields)
    for name, value in fields.items():
        tables = [value] if type(value) is dict else value if type(value) is list and value else []
        for inner in tables[:3] if tables and type(tables[0]) is dict else []:
            for key in inner:
                for bad in [*NONSENSE, -1, 1 << 63]:
                    changed = {**inner, key: bad}
                    yield {**fields, name: changed if type(value) is dict else [changed, *value[1:]]}


def look(path: Path) -> None:
    """What bpckpt does."""
    chain = Chain(os.open(path, os.O_RDONLY), _nothing_beside)
    try:
        describe(chain)
    finally:
        chain.close()


@pytest.mark.parametrize("uid", [0, 65534])
def test_nonsense_in_any_field_is_refused_in_words(
    mover: Mover, tmp_path: Path, fields: tuple[Fields, Fields], uid: int
) -> None:
    meta, state = fields
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    worker = mover.worker()
    for bad_meta, bad_state in [*((bad, state) for bad in nonsense(meta)), *((meta, bad) for bad in nonsense(state))]:
        path = write(tmp_path / "ck", bad_meta, bad_state)
        try:
            look(path)
        except OSError as error:
            assert error.strerror
        try:
            worker.ask("load", path=str(path), uid=uid, gid=uid, limits_of=os.getpid())
        except Refused as refusal:
            assert refusal.text and refusal.errno in (
                errno.EBADMSG,
                errno.EPERM,
                errno.EACCES,
                errno.ENOENT,
                errno.ESTALE,
            ), refusal
    worker.ask("load", path=str(write(tmp_path / "ck", meta, state)), uid=0, gid=0, limits_of=os.getpid())


@pytest.mark.parametrize("about", [[], [b""] * 5, [bytes(16), b"x", b"", 1.0, ""], [1, b"", b"", 1.0, ""], {"a": 1}])
def test_nonsense_in_its_head(tmp_path: Path, fields: tuple[Fields, Fields], about: object) -> None:
    with pytest.raises(img.ImageError):
        look(write(tmp_path / "ck", *fields, about=about))


TERABYTES = struct.pack("<QQ", 4096, img.TOP - 4096)


@pytest.mark.parametrize("runs", [TERABYTES, TERABYTES * 1000])
def test_pages_that_are_claimed_cost_nothing(tmp_path: Path, fields: tuple[Fields, Fields], runs: bytes) -> None:
    total = sum(length for _, length in struct.iter_unpack("<QQ", runs))
    with pytest.raises(img.ImageError, match="its table does not fit"):
        look(write(tmp_path / "ck", {**fields[0], "runs": runs, "total": total}, fields[1]))


@pytest.mark.parametrize(
    "table", [None, [], [b""], [b"x" * 16, []], [b"", [0]], [b"", [-1]], [b"", ["a"]], [[], []], [b"", {}], {"a": 1}]
)
def test_nonsense_in_its_table(tmp_path: Path, fields: tuple[Fields, Fields], table: object) -> None:
    with pytest.raises(img.ImageError):
        look(write(tmp_path / "ck", *fields, table=table))
