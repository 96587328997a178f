"""The ledger of processes that are away: what a master that is killed leaves to the next one.

A file that only grows: a msgpack record ``[part, number, value]`` at each change, with None for what is no more; the
last word on a number of a part counts. A record is one write, so a kill leaves none torn. It is below /run: with the
machine, all ghosts are gone.
"""

from __future__ import annotations

import enum
import os
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import msgpack

from bpfs import log

COMPACT = 1 << 20
"""Bytes of records from which on the file is written anew, when half of it is void."""


class Part(enum.StrEnum):
    """What there are records of."""

    AWAY = "away"  # pid -> bpfs/procs/entries.py
    CHILD = "child"  # pid -> pid of the parent whose ghost has it (or its ghost) as a child
    PERIODIC = "periodic"  # pid -> its periodic checkpoint (bpfs/procs/checkpoint.py)
    ONLOSS = "onloss"  # pid -> what was written to its file of that name
    STREAMS = "streams"  # 0 -> the highest number that was given to a stream


Key: TypeAlias = tuple[str, int]
Records: TypeAlias = dict[Key, Any]

_log = log.get("procs")


class Ledger:
    """One master's; a context manager."""

    def __init__(self, path: Path, afresh: bool = True) -> None:
        """Args:
        afresh: the records of an earlier master are void.
        """
        self._path = path
        self._sizes: dict[Key, int] = {}  # bytes of the valid record of each
        self._valid = 0  # bytes of all these
        self._written = 0
        self._left: Records = {} if afresh else self._read()
        self._fd = -1

    def __enter__(self) -> Ledger:
        self._rewrite(self._left)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._fd = -1

    def left(self, part: Part) -> dict[int, Any]:
        """What the earlier master has left."""
        return {number: value for (of, number), value in self._left.items() if of == part}

    def put(self, part: Part, number: int, value: Any) -> None:
        """Enter something, or what it is by now."""
        record = _pack((part, number), value)
        self._valid += len(record) - self._sizes.get((part, number), 0)
        self._sizes[part, number] = len(record)
        self._append(record)

    def drop(self, part: Part, number: int) -> None:
        """It is no more."""
        size = self._sizes.pop((part, number), 0)
        if size:
            self._valid -= size
            self._append(_pack((part, number), None))

    def _append(self, record: bytes) -> None:
        if self._fd < 0:
            return  # the master ends
        try:
            os.write(self._fd, record)
        except OSError as error:
            _log.error("the next master will not know of all processes: %s: %s", self._path, error.strerror)
        self._written += len(record)
        if self._written > max(COMPACT, 2 * self._valid):
            self._compact()

    def _compact(self) -> None:
        valid = {key: value for key, value in self._read().items() if key in self._sizes}
        os.close(self._fd)
        self._rewrite(valid)

    def _rewrite(self, records: Records) -> None:
        new = self._path.with_name(f".{self._path.name}.new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(new, flags, 0o600)
        packed = {key: _pack(key, value) for key, value in records.items()}
        data = b"".join(packed.values())
        os.write(self._fd, data)
        new.rename(self._path)
        self._sizes = {key: len(record) for key, record in packed.items()}
        self._valid = self._written = len(data)

    def _read(self) -> Records:
        records: Records = {}
        try:
            unpacker = msgpack.Unpacker(strict_map_key=False)
            unpacker.feed(self._path.read_bytes())
            for part, number, value in unpacker:
                records[part, number] = value
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, msgpack.UnpackException) as error:
            _log.error("not all of the last master's processes are known: %s: %s", self._path, error)
        return {key: value for key, value in records.items() if value is not None}


def _pack(key: Key, value: Any) -> bytes:
    return bytes(msgpack.packb([str(key[0]), key[1], value]))
