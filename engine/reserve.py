"""Pids that a node has handed out, and must not hand out again while the process is elsewhere.

A process that was forked on a node and has left, or that a node lost which starts afresh now, keeps its pid in the
cluster; the node's kernel knows nothing of that. So a placeholder has the pid there, a *reserve*: a child of nodeinit
that nobody needs for anything else. It goes when the process comes back (`placeholders.clear_way`), and when the master
says that it is no more.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress

from engine.linux import nsfs, procfs
from engine.placeholders import (
    INIT,
    Command,
    Ids,
    Step,
    World,
    block_of,
    carry_out,
    end,
    end_all,
    outer_pid,
    unneeded,
)


def own_pids(init: int, pids: Iterable[int]) -> list[int]:
    """Those that the node hands out itself. Raises OSError."""
    own = block_of(init)
    return [pid for pid in pids if pid in own]


def reserve(init: int, owners: Mapping[int, int]) -> None:
    """Have something stand for processes elsewhere whose pids are the node's own, so that these are not given away: in
    no group or session of theirs, whose numbers would be in use as long.

    Args:
        owners: real uids, by pids; those that are taken here are left out.

    Raises:
        OSError: the namespace is gone, or does not answer.
    """
    if not owners:
        return
    namespace = nsfs.open_pid_namespace(init)
    try:
        fcntl.flock(namespace, fcntl.LOCK_EX)
        _reserve(init, namespace, owners)
    finally:
        os.close(namespace)


def _reserve(init: int, namespace: int, owners: Mapping[int, int]) -> None:
    world = World(init)
    try:
        free = [pid for pid in owners if world.get(pid) is None]
    finally:
        world.close()
    for uid in {owners[pid] for pid in free}:
        steps = [Step(INIT, pid, Command.NONE) for pid in free if owners[pid] == uid]
        carry_out(init, namespace, steps, uid)


def _owners(init: int, namespace: int, pids: Iterable[int]) -> dict[int, int]:
    found = {}
    for pid in pids:
        with suppress(OSError, KeyError):
            status = procfs.parse_status(procfs.read(f"/proc/{outer_pid(init, namespace, pid)}/status"))
            found[pid] = int(status["Uid"].split()[0])
    return found


def reserved(init: int) -> list[int]:
    """Pids of the node's own that only a placeholder has which nobody needs. Raises OSError."""
    own = block_of(init)
    return [ids.pid for ids in unneeded(init) if ids.pid in own]


def _is_reserve(ids: Ids) -> bool:
    return ids.ppid == INIT and ids.pid not in (ids.pgid, ids.sid) and ids.pgid in (0, INIT)


def sweep(init: int, free: Container[int] = ()) -> list[int] | None:
    """End the placeholders that are no process's parent, group leader or session leader any more.

    Args:
        free: pids of the node's own that no process of the cluster has any more. The others stay reserved.

    Returns:
        The job pids of all that ended; None while there is a birth: try again later.
    """
    try:
        namespace = nsfs.open_pid_namespace(init)
    except OSError:
        return []  # the namespace is gone, and they with it
    try:
        try:
            fcntl.flock(namespace, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        own = block_of(init)
        idle = unneeded(init)
        kept = [ids for ids in idle if ids.pid in own and ids.pid not in free]
        swept = [ids.pid for ids in idle if ids not in kept]
        again = [ids.pid for ids in kept if not _is_reserve(ids)]
        owners = _owners(init, namespace, again)
        ended = end_all(init, namespace, swept + again)
        _reserve(init, namespace, owners)
        return ended
    finally:
        os.close(namespace)


def end_stand_ins(init: int, pids: Sequence[int]) -> dict[int, int]:
    """Kill those of these job pids that are placeholders; gives those of them that `reserve` is to keep."""
    if not pids:
        return {}
    namespace = nsfs.open_pid_namespace(init)
    world = World(init)
    try:
        standing = [pid for pid in pids if (ids := world.get(pid)) is not None and ids.placeholder]
        own = _owners(init, namespace, own_pids(init, standing))
        for pid in standing:
            if (handle := end(init, namespace, pid)) >= 0:
                os.close(handle)
        return own
    finally:
        world.close()
        os.close(namespace)
