"""What of an image may come true when a user brings it up: nobody gets more rights by it than he has.

An image is a file that its owner can edit at will. So the ids, groups, capabilities, limits, priorities and files
that it names are judged as if the user who restarts it had asked for each.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import struct
from typing import Any, Final

from engine import switches
from engine.descriptors.model import Entry
from engine.image import Image, MappedFile
from engine.linux.credentials import Credentials, acting_as

_IOPRIO_CLASS_SHIFT: Final = 13
_IOPRIO_CLASS_RT: Final = 1
_SCHED_NORMAL_POLICIES: Final = (0, 3, 5)  # OTHER, BATCH, IDLE: <linux/sched.h>
_STANDARD: Final = 3


def adapt(
    image: Image, who: Credentials, owner: int, limits: list[tuple[int, int]], relayed: bool = False
) -> list[dict[str, Any]]:
    """Make an image ready to be brought up by a user.

    Args:
        image: changed in place.
        who: the user's rights.
        owner: uid of the file's owner.
        limits: (soft, hard) by RLIMIT_ number, of the user's process that asks.
        relayed: what led outside still does, through a ghost that has lost its process.

    Returns:
        The descriptors that lead outside, as the daemons need them (engine/descriptors/external.py): terminals,
        pipes and sockets of the old process. What it read comes from one, what it wrote goes to others.

    Raises:
        OSError: EPERM, EACCES: the user may not; others: a file is missing or another one.
    """
    _check_owner(image, who, owner)
    if not who.all_powerful:
        _bound_rights(image, limits)
        for file in image.files:
            if not file.nameless:
                _check_file(file, who)
    for entry in image.descriptors:
        if "boot" in entry:
            entry["boot"] = b""  # opened by path, with the process's own rights
    image.frozen_ns = 0  # its sleeps go on with what was left of them
    image.ppid, image.pgid, image.sid = 1, image.pid, image.pid
    if not relayed:
        image.descriptors = _split(image.descriptors)
    return [_external(entry) for entry in image.descriptors if entry["kind"] == "external"]


def _check_owner(image: Image, who: Credentials, owner: int) -> None:
    uids, gids, groups = image.credentials["uids"], image.credentials["gids"], image.credentials["groups"]
    if who.fsuid == 0:
        if owner not in (0, uids[0]):
            raise PermissionError(errno.EPERM, f"a file of user {owner} has an image of a process of user {uids[0]}")
        return
    if set(uids) != {who.fsuid}:
        raise PermissionError(errno.EPERM, f"it is a process of user {uids[0]}")
    mine = {who.fsgid, *who.groups}
    if not set(gids) <= mine or not set(groups) <= mine:
        raise PermissionError(errno.EPERM, "it has groups that you are not in (any more)")


def _bound_rights(image: Image, limits: list[tuple[int, int]]) -> None:
    credentials = image.credentials
    for name in ("inheritable", "permitted", "effective", "ambient"):
        credentials[name] = 0
    image.securebits = 0
    for which, (soft, hard) in enumerate(image.limits[: len(limits)]):
        most = limits[which][1] % 2**64
        image.limits[which] = [min(soft % 2**64, most), min(hard % 2**64, most)]
    locked = sum(region.end - region.start for region in image.regions if region.lock)
    if locked > limits[resource.RLIMIT_MEMLOCK][0] % 2**64:
        for region in image.regions:
            region.lock = 0
    image.oom_score_adj = max(image.oom_score_adj, 0)
    for thread in image.threads:
        if thread.io_priority >> _IOPRIO_CLASS_SHIFT == _IOPRIO_CLASS_RT:
            thread.io_priority = 0
        thread.policy = _bound_policy(thread.policy)
        thread.switches = switches.bounded(thread.switches)


def _bound_policy(policy: bytes) -> bytes:
    # struct sched_attr: u32 size, policy; u64 flags; s32 nice; u32 priority; … (sched_setattr(2))
    if len(policy) < 24:
        return policy
    size, kind, flags, nice, _ = struct.unpack_from("<IIQiI", policy)
    if kind not in _SCHED_NORMAL_POLICIES:
        kind = 0
    return struct.pack("<IIQiI", size, kind, flags, max(nice, 0), 0) + bytes(len(policy) - 24)


def _check_file(file: MappedFile, who: Credentials) -> None:
    # Where no digest decides, mappings are made as root from the very inode that the image names: the user must be able
    # to open it himself.
    path = os.fsdecode(file.path)
    flags = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    with acting_as(who):
        try:
            if stat.S_ISDIR(os.stat(file.path).st_mode):
                fd = os.open(file.path, flags | os.O_PATH)
            else:
                fd = os.open(file.path, flags | (os.O_RDWR if file.writable else os.O_RDONLY))
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
    try:
        found = os.fstat(fd)
        if not file.digest and (found.st_dev, found.st_ino) != (file.device, file.inode):
            raise OSError(errno.ESTALE, "is not the same file here", path)
    finally:
        os.close(fd)


def renumber(image: Image, pid: int) -> dict[int, tuple[bytes, bytes]]:
    """Give the process another pid.

    Returns:
        What must change in its memory, address -> (old, new): the C library keeps a thread's id at the address that
        the kernel clears at the thread's end (set_tid_address(2)).
    """
    leader = image.threads[0]
    patches = {leader.clear_tid: (struct.pack("<i", leader.tid), struct.pack("<i", pid))} if leader.clear_tid else {}
    leader.tid = pid
    image.pid = image.pgid = image.sid = pid
    return patches


def _split(table: list[Entry]) -> list[Entry]:
    """A terminal that was input and output at once becomes two descriptions: each goes somewhere else now."""
    result: list[Entry] = []
    for entry in table:
        if entry["kind"] != "external" or entry["flags"] & os.O_ACCMODE != os.O_RDWR:
            result.append(entry)
            continue
        halves = ([f for f in entry["fds"] if f[0] == 0], [f for f in entry["fds"] if f[0] != 0])
        for fds, access in zip(halves, (os.O_RDONLY, os.O_WRONLY), strict=True):
            if fds:
                flags = entry["flags"] & ~os.O_ACCMODE | access
                result.append({**entry, "fds": fds, "flags": flags, "key": fds[0][0]})
    return result


def _external(entry: Entry) -> dict[str, Any]:
    numbers = [fd for fd, _ in entry["fds"]]
    return {
        "key": entry["key"], "fds": numbers, "kind": "pipe", "access": entry["flags"] & os.O_ACCMODE,
        "flags": entry["flags"], "stdio": min(numbers) < _STANDARD, "termios": None, "winsize": None,
        "dev": entry["dev"], "ino": entry["ino"],
    }  # fmt: skip
