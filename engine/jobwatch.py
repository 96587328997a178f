"""What jobs fork, exec and become, as csrc/jobwatch.c learns it: the node's side of its socket.

jobwatch has to run in the machine's initial pid and network namespaces, which alone the kernel tells of processes. On
a machine of its own a node starts one for itself; virtual nodes share the one that was started before them.
"""

from __future__ import annotations

import array
import enum
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.linux import procfs

PROGRAM: Final = Path(__file__).parent / "bin" / "jobwatch"
PACKET_MAX: Final = 32768  # csrc/jobwatch.h
_LOOK: Final = struct.Struct("=i")  # struct look
RECORD: Final = struct.Struct("=HBBiiiiiiIII16s")  # struct record, without the command line
_ARGUMENTS_MAX: Final = 3072  # likewise
_BACKLOG: Final = 1024


class Kind(enum.IntEnum):
    """What a record tells (csrc/jobwatch.h)."""

    IS = 1  # how a process is now
    ENDED = 2
    REAPED = 3  # its parent has waited for it
    STOOD = 4  # a placeholder has ended, or (state T) was stopped, and not by order


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one process; pids are job pids.

    Attributes:
        state: letter of /proc/PID/stat.
        tty: its controlling terminal, as in /proc/PID/stat; 0: none.
        code: ENDED: its wait status; -1 where nobody knows.
        uid, gid: the real ones.
        cmdline: as in /proc/PID/cmdline, its first 3 kB.
    """

    kind: Kind
    state: str
    pid: int
    ppid: int
    pgid: int
    sid: int
    tty: int
    code: int
    uid: int
    gid: int
    comm: bytes
    cmdline: bytes


def parse(packet: bytes) -> Iterator[Record]:
    """The records of one packet. Raises ValueError or struct.error on anything that jobwatch does not send."""
    at = 0
    while at < len(packet):
        size, kind, state, pid, ppid, pgid, sid, tty, code, uid, gid, length, comm = RECORD.unpack_from(packet, at)
        if size < RECORD.size + length or at + size > len(packet):
            raise ValueError(f"a record of {size} bytes with {length} of arguments")
        start = at + RECORD.size
        yield Record(
            Kind(kind), chr(state), pid, ppid, pgid, sid, tty, code, uid, gid,
            comm.split(b"\0", 1)[0], packet[start : start + length],
        )  # fmt: skip
        at += size


def describe(init: int, pid: int) -> bytes:
    """The packet that tells how a job is now, as jobwatch would. Raises OSError: it is gone."""
    folder = f"/proc/{init}/root/proc/{pid}"
    text = procfs.read(f"{folder}/stat")
    stat, tty = procfs.parse_stat(text), int(text.rpartition(b")")[2].split()[4])
    status = procfs.parse_status(procfs.read(f"{folder}/status"))
    cmdline = procfs.read(f"{folder}/cmdline")[:_ARGUMENTS_MAX]
    size = (RECORD.size + len(cmdline) + 3) & ~3
    ids = int(status["Uid"].split()[0]), int(status["Gid"].split()[0])
    head = RECORD.pack(size, Kind.IS, ord(stat.state), pid, stat.ppid, stat.pgid, stat.sid, tty, 0, *ids,
                       len(cmdline), stat.comm)  # fmt: skip
    return (head + cmdline).ljust(size, b"\0")


def still_news(packets: Sequence[bytes], alive: Container[int]) -> list[bytes]:
    """What is left of these packets, in their order, for somebody who may have heard of some: to be told once more.

    Who has come and gone, and was waited for, is no news: told again, it would be a child to wait for. Of several ends
    of one process only the last was its own: the others were those of copies, left behind by moves.

    Args:
        alive: pids that are in use now; these have not ended.

    Raises:
        ValueError, struct.error: as `parse`.
    """
    reaped, ended, left = set[int](), set[int](), list[bytes]()
    for packet in reversed(packets):
        kept = list[bytes]()
        for kind, pid, record in reversed(list(_pieces(packet))):
            if kind == Kind.IS:
                stays = pid not in reaped
            elif kind == Kind.ENDED:
                stays = pid not in alive and pid not in ended
                ended.add(pid)
            else:
                stays = pid not in alive
            if kind == Kind.REAPED:
                reaped.add(pid)
                ended.discard(pid)
            if stays:
                kept.append(record)
        left.append(b"".join(reversed(kept)))
    return left[::-1]


def _pieces(packet: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Kind, pid and bytes of each record."""
    at = 0
    while at < len(packet):
        size, kind, _, pid = RECORD.unpack_from(packet, at)[:4]
        if size < RECORD.size or at + size > len(packet):
            raise ValueError(f"a record of {size} bytes")
        yield kind, pid, packet[at : at + size]
        at += size


def open_shared(path: Path) -> subprocess.Popen[bytes]:
    """Start one jobwatch for all nodes of this machine, which connect to it at `path`. Raises OSError."""
    folder = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            # The path may be longer than an address: go by the directory's descriptor.
            listening.bind(f"/proc/self/fd/{folder}/{path.name}")
            listening.listen(_BACKLOG)
            return _start(listening)
    finally:
        os.close(folder)


def _start(sock: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(PROGRAM), str(sock.fileno())], pass_fds=[sock.fileno()], cwd="/", start_new_session=True, env={},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


class JobWatch:
    """One job space, watched.

    Attributes:
        socket: non-blocking; a packet of records a message; its end means that jobwatch has died.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Go on with what was begun over this socket, which is this object's now."""
        self.socket = sock
        self.socket.setblocking(False)

    @classmethod
    def begin(cls, init: int, shared: Path | None, spawn: Callable[..., object]) -> JobWatch:
        """Begin to watch the namespace whose pid 1 is `init`.

        Args:
            shared: of `open_shared`; None: start a jobwatch for this one alone, which ends with it.
            spawn: starts a program, as `Spawn` of engine/jobspace.py.

        Raises:
            OSError: there is no jobwatch.
        """
        sock = _connect(shared) if shared is not None else _open(spawn)
        try:
            fds = [os.open(f"/proc/{init}/root/proc", os.O_PATH | os.O_CLOEXEC)]
            try:
                fds.append(os.open(f"/proc/{init}/ns/pid", os.O_RDONLY | os.O_CLOEXEC))
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
                sock.sendmsg([_LOOK.pack(0)], [rights])
            finally:
                for fd in fds:
                    os.close(fd)
            return cls(sock)
        except BaseException:
            sock.close()
            raise

    def look(self, pid: int = 0) -> None:
        """Have a process looked at now; 0: all of them, for the next jobs are about to come."""
        try:
            self.socket.send(_LOOK.pack(pid))
        except OSError:
            pass  # it is dead, or busy and looks anyway

    def close(self) -> None:
        """Stop watching."""
        self.socket.close()


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{folder}/{path.name}")
    except OSError:
        sock.close()
        raise
    finally:
        os.close(folder)
    return sock


def _open(spawn: Callable[..., object]) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            spawn([str(PROGRAM), "@0"], {}, [theirs.fileno()])
        except OSError:
            ours.close()
            raise
    return ours
