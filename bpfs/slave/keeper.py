"""What of a node outlives its bpslave: the supervisor keeps descriptors, and what belongs to them, for the next life.

A life tells its supervisor what to keep, over a SEQPACKET socket, before anybody else can know of it; the next life is
a fork of the supervisor and so has all of it. What has to live on (nodeinit, iorelay, jobwatch) is started by the
supervisor, for it would end with its parent.

A packet is a msgpack list: the order, and its arguments. Keys are tuples, of a name and, often, a number.
"""

from __future__ import annotations

import array
import enum
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EPIPE
from typing import Any, Final, Protocol, TypeAlias

import msgpack

PACKET: Final = 256 << 10
MAX_FDS: Final = 16
SPAWN_SECONDS: Final = 20.0  # an exec takes a millisecond; a loaded machine may need longer

Key: TypeAlias = "tuple[str, int]"


class Order(enum.IntEnum):
    """What a life tells its supervisor."""

    LEASE = 1  # when jobs must be dead (seconds of CLOCK_BOOTTIME; 0: never), end of lease, node, `onlost`, its seconds
    KEEP = 2  # key, value, and descriptors: keep these, in the place of any that the key had
    DROP = 3  # key
    CLEAR = 4  # keep nothing: this life is to be the last of its jobs
    SPAWN = 5  # arguments, environment, descriptors: start a program; answered by pid and errno


@dataclass(slots=True)
class Kept:
    """What is kept under a key."""

    value: Any = None
    fds: list[int] = field(default_factory=list)


class Spawner(Protocol):
    """Starts programs that live as long as the node."""

    def spawn(self, arguments: Sequence[str], environment: Mapping[str, str], fds: Sequence[int]) -> int:
        """Start a program in a session of its own; gives its pid.

        Args:
            arguments, environment: a word `@0` stands for the number that the first descriptor has in the program.

        Raises:
            OSError: it cannot be started.
        """


class Alone:
    """A spawner for who has no supervisor: what it starts ends with this process."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []

    def spawn(self, arguments: Sequence[str], environment: Mapping[str, str], fds: Sequence[int]) -> int:
        """See `Spawner`."""
        self._started.append(_start(arguments, environment, fds))
        return self._started[-1].pid


class Keeper:
    """A life's end of the socket."""

    def __init__(self, sock: socket.socket, kept: Mapping[Key, Kept], lease_end: float = 0.0, life: int = 0) -> None:
        """Args:
        kept: what the life before has left; empty where this one begins afresh.
        lease_end: until when the master waits for it, in seconds of CLOCK_BOOTTIME.
        life: which one this is of all that have had it, from 0: numbers that a life gives out are to be new.
        """
        self._sock = sock
        self.kept = kept
        self.lease_end = lease_end
        self.life = life

    def note_lease(self, fence: float, end: float, node: int, onlost: str, after: float) -> None:
        """Say until when this life may hold jobs (0: for ever), when its lease ends, and what the master said."""
        with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            self._sock.send(_pack(Order.LEASE, fence, end, node, onlost, after), socket.MSG_DONTWAIT)

    def keep(self, key: Key, value: Any = None, fds: Sequence[int] = ()) -> None:
        """Have something kept; the descriptors stay the caller's as well."""
        self._tell(_pack(Order.KEEP, key, value), fds)

    def drop(self, key: Key) -> None:
        """It is no more."""
        self._tell(_pack(Order.DROP, key))

    def clear(self) -> None:
        """No other life shall have any of it."""
        self._tell(_pack(Order.CLEAR))

    def spawn(self, arguments: Sequence[str], environment: Mapping[str, str], fds: Sequence[int]) -> int:
        """See `Spawner`."""
        self._sock.settimeout(SPAWN_SECONDS)
        try:
            self._tell(_pack(Order.SPAWN, list(arguments), dict(environment)), fds)
            answer = self._sock.recv(PACKET)
        finally:
            self._sock.settimeout(None)
        if not answer:
            raise OSError(EPIPE, "the supervisor has ended")
        pid, errno = msgpack.unpackb(answer)
        if errno:
            raise OSError(errno, os.strerror(errno), arguments[0])
        return int(pid)

    def of(self, name: str) -> Iterator[tuple[int, Kept]]:
        """All that the life before has left by this name: numbers, and what there is."""
        for (kind, number), kept in self.kept.items():
            if kind == name:
                yield number, kept

    def _tell(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        # Without a supervisor nobody needs it: this process is about to be killed.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._sock.sendmsg([packet], rights, socket.MSG_NOSIGNAL)


class Store:
    """The supervisor's: what is kept, and what of it has to live on."""

    def __init__(self) -> None:
        self.kept: dict[Key, Kept] = {}

    def keep(self, key: Sequence[Any], value: Any, fds: list[int]) -> None:
        """Take charge of these descriptors."""
        self.drop(key)
        self.kept[str(key[0]), int(key[1])] = Kept(value, fds)

    def drop(self, key: Sequence[Any]) -> None:
        """Close what is kept under a key."""
        for fd in self.kept.pop((str(key[0]), int(key[1])), Kept()).fds:
            os.close(fd)

    def clear(self) -> None:
        """Close all."""
        for key in list(self.kept):
            self.drop(key)

    def __contains__(self, name: str) -> bool:
        return any(kind == name for kind, _ in self.kept)

    def processes(self) -> set[int]:
        """The pids of what has to live on."""
        return {int(kept.value) for (kind, _), kept in self.kept.items() if kind in PROCESSES}


PROCESSES: Final = frozenset({"space", "relay", "jobwatch"})
"""Names under which a process is kept, whose pid is the value."""


def pair() -> tuple[socket.socket, socket.socket]:
    """The supervisor's end and a life's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * PACKET)
    return ours, theirs


def receive(sock: socket.socket) -> tuple[list[Any], list[int]] | None:
    """One packet, without waiting, and its descriptors; None at the end. Raises BlockingIOError."""
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC  # which socket.recv_fds does not heed
    fds = array.array("i")
    try:
        data, ancillary, _, _ = sock.recvmsg(PACKET, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), flags)
    except ConnectionResetError:
        return None
    for _, _, content in ancillary:
        fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return (msgpack.unpackb(data), list(fds)) if data else None


def spawn(sock: socket.socket, arguments: Sequence[str], environment: Mapping[str, str], fds: Sequence[int]) -> None:
    """Start a program for a life, and tell it the pid; the descriptors are closed here."""
    pid, errno = 0, 0
    try:
        process = _start(arguments, environment, fds)
        pid, process.returncode = process.pid, 0  # we reap all our children ourselves
    except OSError as error:
        errno = error.errno or EPIPE
    finally:
        for fd in fds:
            os.close(fd)
    with suppress(OSError):
        sock.send(_pack(pid, errno), socket.MSG_NOSIGNAL)


def _start(arguments: Sequence[str], environment: Mapping[str, str], fds: Sequence[int]) -> subprocess.Popen[bytes]:
    def told(word: str) -> str:
        return str(fds[int(word[1:])]) if word.startswith("@") else word

    return subprocess.Popen(
        [told(word) for word in arguments], env={name: told(word) for name, word in environment.items()},
        pass_fds=list(fds), cwd="/", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _pack(*words: Any) -> bytes:
    return bytes(msgpack.packb(words))
