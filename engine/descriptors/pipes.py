"""Pipes and fifos wholly inside the process: both ends are among its descriptors and no other process has one.

They travel with what they hold. All others are external. A tree that moves as a whole counts as one process, and has
pipes as well of which one end is closed for good: who had it has ended.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import termios

from engine.descriptors.model import SETTABLE, Entry, Kind, Probe, Refusal, Source, Target, boot_id, is_mode, reopen
from engine.descriptors.paths import open_object
from engine.linux.tee import tee

_F_SETPIPE_SZ = 1031
_F_GETPIPE_SZ = 1032


def is_inside(source: Source, probe: Probe) -> bool:
    """Whether both ends are held by the process and by nobody else."""
    reads = writes = False
    for end in source.same_object(probe):
        reads |= end.access != os.O_WRONLY
        writes |= end.access != os.O_RDONLY
    # /proc is read through only for the rare process that talks to itself.
    both = (reads and writes) or (source.kin and probe.link.startswith(b"pipe:"))
    return bool(both) and not source.held_elsewhere(probe)


def _matches(source: Source, probe: Probe) -> bool:
    return is_mode(probe, stat.S_IFIFO) and not probe.flags & os.O_PATH and is_inside(source, probe)


def _dump(source: Source, probe: Probe) -> Entry:
    named = not probe.link.startswith(b"pipe:")
    more: Entry = {"path": probe.link, "boot": boot_id()} if named else {}
    ends = source.same_object(probe)
    if probe is ends[0]:
        reader = next((end for end in ends if end.access != os.O_WRONLY), None)
        more["size"], more["content"] = _content(source, reader) if reader is not None else (_size(source, probe), b"")
    return probe.entry("fifo" if named else "pipe", **more)


def _size(source: Source, end: Probe) -> int:
    return fcntl.fcntl(source.grab(end), _F_GETPIPE_SZ)


def _content(source: Source, reader: Probe) -> tuple[int, bytes]:
    fd, size = source.grab(reader), _size(source, reader)
    waiting = _waiting(fd)
    if not waiting:
        return size, b""
    if reader.flags & os.O_DIRECT:
        raise Refusal("is a pipe of packets that have not been read")
    source.take_room(waiting)
    return size, _peek(fd, size, waiting)


def _waiting(fd: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), "little")


def _drain(fd: int) -> None:
    while waiting := _waiting(fd):
        os.read(fd, waiting)


def _peek(fd: int, size: int, waiting: int) -> bytes:
    out, into = os.pipe()
    try:
        fcntl.fcntl(into, _F_SETPIPE_SZ, size)
        count = tee(fd, into, waiting)
        if count != waiting:
            raise Refusal(f"is a pipe whose content cannot be read whole ({count} of {waiting} bytes)")
        data = b""
        while len(data) < count:
            data += os.read(out, count - len(data))
        return data
    finally:
        os.close(out)
        os.close(into)


def _build_pipe(target: Target, entry: Entry) -> int:
    reader, writer = ("pipe", entry["ino"], os.O_RDONLY), ("pipe", entry["ino"], os.O_WRONLY)
    if "content" in entry:
        out, into = os.pipe()
        target.offer(reader, out)
        target.offer(writer, into)
        target.made["pipe", entry["ino"]] = target.spare(os.dup(out))  # to open further descriptions from
        _fill(into, entry)
    wanted = entry["flags"] & os.O_ACCMODE
    fd = target.claim(("pipe", entry["ino"], wanted))
    if fd is None:
        fd = reopen(target.made["pipe", entry["ino"]], wanted | os.O_NONBLOCK)
    return fd


def _fill(into: int, entry: Entry) -> None:
    if entry["size"] != fcntl.fcntl(into, _F_GETPIPE_SZ):
        fcntl.fcntl(into, _F_SETPIPE_SZ, entry["size"])
    data = entry["content"]
    os.set_blocking(into, False)
    if data and os.write(into, data) != len(data):
        raise OSError(errno.ENOSPC, "the content of a pipe does not fit here")


def _build_fifo(target: Target, entry: Entry) -> int:
    key = ("fifo", entry["dev"], entry["ino"])
    if "content" in entry:
        # Read and write at once never waits, and lets both ends be opened after it.
        both = open_object(target, entry, stat.S_IFIFO, os.O_RDWR | os.O_NONBLOCK)
        target.made[key] = target.spare(both)
        if entry["boot"] != boot_id() or not _waiting(both):
            _drain(both)  # what a ghost has kept since its process left
            _fill(both, entry)
        # else it is the very fifo of the source, with its content in it
    flags = entry["flags"] & (os.O_ACCMODE | SETTABLE) | os.O_NONBLOCK
    return reopen(target.made[key], flags)


KINDS = (
    Kind("pipe", _matches, _dump, _build_pipe),
    Kind("fifo", lambda _, __: False, _dump, _build_fifo),
)
