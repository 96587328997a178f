"""What the ledger says of a process that is away, or is just leaving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, TypeAlias

from bpfs.procs.process import Identity, Pid, Process, ProcState, Stay
from bpfs.procs.stdio import Stdio
from bpfs.wire.mux import ChanKind, Channel

Entry: TypeAlias = dict[str, Any]
Ends: TypeAlias = dict[tuple[int, int], int]

_IDENTITY = attrgetter(*(field.name for field in fields(Identity)))


@dataclass(frozen=True, slots=True)
class Bound:
    """Where a process is about to be, from before it ends where it was; stream, ends: as of its `Stdio` there."""

    place: int
    stream: int
    ends: Ends


def entry_of(
    proc: Process, stdio: Stdio, real: bool, stopped_by: int, stopped_after: int, bound: Bound | None = None
) -> Entry:
    """What the next master has to know of a process; the arguments are those of an `Away`."""
    return {
        "real": real,
        "place": int(proc.place),
        "stopped": proc.state is ProcState.STOPPED,
        "stopped_by": int(stopped_by),
        "stopped_after": stopped_after,
        "native": proc.native,
        "hostpid": proc.hostpid,
        "strict": [proc.wants_strict, proc.strict],
        "identity": [sorted(part) if isinstance(part, frozenset) else part for part in _IDENTITY(proc.identity)],
        "history": [[stay.node, stay.since, stay.freeze_ms, stay.bytes] for stay in proc.history],
        "stdio": _entry_of_stdio(stdio),
        "bound": [bound.place, bound.stream, _entry_of_ends(bound.ends)] if bound is not None else None,
    }


def _entry_of_stdio(stdio: Stdio) -> Entry:
    return {
        "comm": stdio.comm,
        "stream": stdio.stream,
        "channels": [[c.number, int(c.kind), c.access, list(c.externals)] for c in stdio.channels.values()],
        "ends": _entry_of_ends(stdio.ends),
        "files": list(stdio.files.items()),
    }


def _entry_of_ends(ends: Mapping[tuple[int, int], int]) -> list[list[int]]:
    return [[*end, number] for end, number in ends.items()]


def _ends(entry: list[list[int]]) -> Ends:
    return {(dev, ino): number for dev, ino, number in entry}


def restored(pid: int, entry: Entry) -> tuple[Process, Stdio]:
    """The process, and what its ghost relays, as an earlier master has left them."""
    parts: list[Any] = [frozenset(part) if isinstance(part, list) else part for part in entry["identity"]]
    proc = Process(
        Pid(pid), Identity(*parts), int(entry["place"]),
        ProcState.STOPPED if entry["stopped"] else ProcState.RUNNING, entry["hostpid"], entry["native"],
    )  # fmt: skip
    proc.wants_strict, proc.strict = entry["strict"]
    proc.history = [Stay(*stay) for stay in entry["history"]]
    kept = entry["stdio"]
    channels = {number: Channel(number, ChanKind(kind), access, tuple(externals))
                for number, kind, access, externals in kept["channels"]}  # fmt: skip
    return proc, Stdio(channels, kept["comm"], kept["stream"], _ends(kept["ends"]), dict(kept["files"]))


def bound_of(entry: Entry) -> Bound | None:
    """Where it was about to be when that master died, if it was moving."""
    bound = entry["bound"]
    return Bound(int(bound[0]), int(bound[1]), _ends(bound[2])) if bound is not None else None
