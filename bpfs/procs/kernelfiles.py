# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of procs/PID that are the kernel's own, in its format: read where the process runs, whenever somebody asks.

On a node they come from the jobs' own /proc, so that every pid in them is the cluster's. What the kernel keeps from
those who may not trace a process (addresses, where it waits) nobody sees in `stat`, and only its owner in the others.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from bpfs.errors import BpfsError
from bpfs.procs.process import Process
from bpfs.procs.pstext import guarded
from bpfs.tree.entries import Access, File
from bpfs.wire.messages import MM_FILES

ANSWER_S = 5.0
"""Seconds after which a node that does not answer has failed a read: a reader is to hear of it, not to hang."""

_OWN, _ALL = 0o400, 0o444

_FILES = (
    ("stat", _ALL, "state, parent, times and more in one line"),
    ("status", _ALL, "the same for people, with ids, signals and memory"),
    ("statm", _ALL, "memory in pages"),
    ("environ", _OWN, "its environment at its last exec, each entry ended by a NUL"),
    ("maps", _OWN, "what its memory consists of"),
    ("smaps_rollup", _OWN, "how much of it is shared, dirty, swapped ..., in kB"),
    ("io", _OWN, "bytes that it has read and written"),
    ("limits", _ALL, "its resource limits"),
    ("wchan", _OWN, "where in the kernel it waits"),
)

Read = Callable[[Process, tuple[str, ...]], Awaitable[dict[str, bytes]]]


def entries(read: Read) -> tuple[File[Process], ...]:
    """The entries, for the table of procs/PID."""

    def entry(name: str, mode: int, text: str) -> File[Process]:
        async def content(proc: Process) -> bytes:
            text = (await read(proc, (name,)))[name]
            return guarded(text) if name == "stat" else text

        return File(
            name,
            f"as /proc/PID/{name}: {text}",
            read=content,
            access=lambda proc: Access(proc.identity.uid, proc.identity.gid, mode),
            sized=False,
        )

    return tuple(entry(*row) for row in _FILES)


async def read_local(pid: int, names: tuple[str, ...]) -> dict[str, bytes]:
    """Reads files of /proc of a process of this machine.

    Raises:
        BpfsError: ESRCH, there is none; ETIMEDOUT, the kernel keeps us waiting.
    """

    def read() -> dict[str, bytes]:
        return {name: Path(f"/proc/{pid}/{name}").read_bytes() for name in names}

    try:
        if not MM_FILES.intersection(names):
            return read()
        # These wait for the process's memory map, and it may hold that while it waits for our own tree.
        with trio.fail_after(ANSWER_S):
            return await trio.to_thread.run_sync(read, abandon_on_cancel=True)
    except trio.TooSlowError:
        raise BpfsError(errno.ETIMEDOUT, f"process {pid} is in the midst of a change to its memory") from None
    except OSError:
        raise BpfsError(errno.ESRCH, f"there is no process {pid}") from None
