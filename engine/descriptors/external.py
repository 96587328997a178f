"""What stays on the master and is relayed through the ghost: terminals, pipes and standard sockets to other processes,
and standard descriptors that are files where the node has no files of users.

On the source such a description becomes an `External`, a dict for the daemons:

    key      names it in this inspection
    fds      its numbers, ascending
    kind     tty, pipe, fifo, socket, file or chardev
    access   O_RDONLY, O_WRONLY or O_RDWR
    flags    all status flags
    stdio    whether it is (a duplicate of) one of the three standard descriptors
    termios  struct termios of the kernel (36 bytes, TCGETS) of a tty, else None
    winsize  struct winsize (8 bytes, TIOCGWINSZ) of a tty, else None
    dev, ino the object on this machine: a node finds its own relay ends by them
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from typing import Any

from engine.descriptors import sockets
from engine.descriptors.model import Entry, Kind, Probe, Refusal, Source, Target, is_mode
from engine.descriptors.pipes import is_inside
from engine.descriptors.relatives import writes_together

_TCGETS = 0x5401
_TIOCGWINSZ = 0x5413
_TERMIOS_BYTES = 36  # struct termios of the kernel, <asm-generic/termbits.h>
_WINSIZE_BYTES = 8
# Majors of terminals (Documentation/admin-guide/devices.txt): consoles, serial lines, ptys, /dev/tty.
_TTY_MAJORS = {3, 4, 5, 166, 188, 204, 207, 229, *range(136, 144)}
_PTMX = os.makedev(5, 2)


def _is_tty(_: Source, probe: Probe) -> bool:
    rdev = probe.status.rdev
    return is_mode(probe, stat.S_IFCHR) and os.major(rdev) in _TTY_MAJORS and rdev != _PTMX


def _is_outside_pipe(source: Source, probe: Probe) -> bool:
    return is_mode(probe, stat.S_IFIFO) and not is_inside(source, probe)


def _is_standard_socket(source: Source, probe: Probe) -> bool:
    return is_mode(probe, stat.S_IFSOCK) and probe.stdio and not sockets.is_inside(source, probe)


def _is_shared_deleted(source: Source, probe: Probe) -> bool:
    # A parent that reads its child's output from a temporary file without a name.
    return is_mode(probe, stat.S_IFREG) and probe.stdio and probe.status.nlink == 0 and source.held_elsewhere(probe)


def _is_standard_file(source: Source, probe: Probe) -> bool:
    # One that is read and written has one offset for both, which no relay can keep.
    if source.at_home and writes_together(source, probe):
        return True
    return source.files_stay and is_mode(probe, stat.S_IFREG) and probe.stdio and probe.access != os.O_RDWR


def _dump(_: Source, probe: Probe) -> Entry:
    return probe.entry("external", key=probe.fd)


def _dump_socket(source: Source, probe: Probe) -> Entry:
    with sockets.borrow(source.grab(probe)) as sock:
        if sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise Refusal(f"is {sockets.describe(sock)}")
    return _dump(source, probe)


def dump(source: Source, probe: Probe) -> Entry:
    """The entry of a description of any kind that is to be relayed. Raises Refusal."""
    return (_dump_socket if is_mode(probe, stat.S_IFSOCK) else _dump)(source, probe)


def describe_external(source: Source, probe: Probe, entry: Entry) -> dict[str, Any]:
    """The External of an entry, see the head of this module."""
    kind = _name(probe)
    return {
        "key": entry["key"],
        "fds": [fd for fd, _ in probe.fds],
        "kind": kind,
        "access": probe.access,
        "flags": probe.flags,
        "stdio": probe.stdio,
        "termios": _ioctl(source.grab(probe), _TCGETS, _TERMIOS_BYTES) if kind == "tty" else None,
        "winsize": _ioctl(source.grab(probe), _TIOCGWINSZ, _WINSIZE_BYTES) if kind == "tty" else None,
        "dev": probe.status.dev,
        "ino": probe.status.ino,
    }


def _name(probe: Probe) -> str:
    if is_mode(probe, stat.S_IFCHR):
        return "tty"
    if is_mode(probe, stat.S_IFSOCK):
        return "socket"
    if is_mode(probe, stat.S_IFREG):
        return "file"
    return "pipe" if probe.link.startswith(b"pipe:") else "fifo"


def _ioctl(fd: int, request: int, size: int) -> bytes | None:
    try:
        return fcntl.ioctl(fd, request, bytes(size))
    except OSError:
        return None  # hung up


def build(target: Target, entry: Entry) -> int:
    """What is handed to the process for the entry's key. Raises OSError."""
    fd = target.externals.get(entry["key"])
    if fd is None:
        raise OSError(errno.EBADF, f"no relay for descriptor {entry['fds'][0][0]} was given")
    return os.dup(fd)


KINDS = (
    Kind("external", _is_tty, _dump, build),
    Kind("external", _is_outside_pipe, _dump, build),
    Kind("external", _is_standard_socket, _dump_socket, build),
    Kind("external", _is_shared_deleted, _dump, build),
    Kind("external", _is_standard_file, _dump, build),
)
