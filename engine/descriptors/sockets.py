"""Socket pairs inside the process move; every other socket is refused by name, with both its addresses."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from engine.descriptors.model import Entry, Kind, Probe, Refusal, Source, Target, is_mode
from engine.linux.unix_diag import UnixDiag, UnixSocket

_FAMILIES = {
    socket.AF_NETLINK: "netlink", socket.AF_PACKET: "packet", socket.AF_VSOCK: "vsock", socket.AF_ALG: "kernel crypto",
}  # fmt: skip
_RAW = {socket.SOCK_RAW: "raw IP", socket.SOCK_DGRAM: "UDP", socket.SOCK_STREAM: "TCP"}
_PROTOCOLS = {socket.IPPROTO_SCTP: "SCTP", 262: "MPTCP"}
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_SO_PEEK_OFF = 42
_RECEIVING, _SENDING = 1, 2  # sk_shutdown bits, <net/sock.h>
_ROOM = 16 << 20  # send buffer while a queue is filled, bytes
_MESSAGE = 1 << 20  # longest single message looked at


@contextmanager
def borrow(fd: int) -> Iterator[socket.socket]:
    """A socket object on a descriptor that stays open."""
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def describe(sock: socket.socket) -> str:
    """A socket in words: `a TCP socket (127.0.0.1:1234 -> 127.0.0.1:80)`."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        name = _PROTOCOLS.get(sock.proto) or _RAW.get(sock.type, "IP")
        return _with_addresses(sock, name)
    if sock.family == socket.AF_UNIX:
        name = _unix_name(sock)
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return f"a {'listening ' if listening else ''}unix socket {name}"
    return f"a {_FAMILIES.get(sock.family, f'family {int(sock.family)}')} socket"


def _with_addresses(sock: socket.socket, name: str) -> str:
    local = _address(sock.getsockname())
    if sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return f"a listening {name} socket ({local})"
    try:
        return f"a {name} socket ({local} -> {_address(sock.getpeername())})"
    except OSError:
        return f"a {name} socket ({local})"


def _address(name: object) -> str:
    if not isinstance(name, tuple) or len(name) < 2:
        return str(name)
    host = f"[{name[0]}]" if ":" in str(name[0]) else name[0]
    return f"{host}:{name[1]}"


def _unix_name(sock: socket.socket) -> str:
    try:
        names = [sock.getsockname(), sock.getpeername()]
    except OSError:
        names = [sock.getsockname()]
    known = [os.fsdecode(name) for name in names if name]
    return f"({', '.join(known)})" if known else "to another process"


def _matches(_: Source, probe: Probe) -> bool:
    return is_mode(probe, stat.S_IFSOCK)


def _dump(source: Source, probe: Probe) -> Entry:
    with borrow(source.grab(probe)) as sock:
        state = _inside_pair(source, probe, sock)
        if not state:
            raise Refusal(f"is {describe(sock)}")
        return probe.entry(
            "socketpair", peer=state.peer, type=int(sock.type), shutdown=state.shutdown,
            queue=_queue(source, sock, state),
            sndbuf=sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
            rcvbuf=sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
            passcred=sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED),
        )  # fmt: skip


def is_inside(source: Source, probe: Probe) -> bool:
    """Whether it is one end of a pair that nobody but the process has."""
    with borrow(source.grab(probe)) as sock:
        return _inside_pair(source, probe, sock) is not None


def _inside_pair(source: Source, probe: Probe, sock: socket.socket) -> UnixSocket | None:
    if sock.family != socket.AF_UNIX or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return None
    diag = UnixDiag()
    try:
        state = diag.get(probe.status.ino)
        peer = diag.get(state.peer) if state.peer else None
    except OSError:
        return None  # another network namespace, or a kernel that does not tell
    finally:
        diag.close()
    ends = [
        other
        for other in source.probes
        if other.status.ino in (probe.status.ino, state.peer) and _matches(source, other)
    ]
    is_here = any(other.status.ino == state.peer for other in ends)
    if state.named or (peer and (peer.named or not is_here or peer.peer != probe.status.ino)):
        return None
    if not peer and not state.shutdown:
        return None  # never connected
    return None if any(source.held_elsewhere(end) for end in ends) else state


def _queue(source: Source, sock: socket.socket, state: UnixSocket) -> list[bytes]:
    """What waits to be read, left in place: one element a message, or all of a stream."""
    before = sock.getsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF)
    sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
    try:
        return _peek_all(source, sock, state)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, before)


def _peek_all(source: Source, sock: socket.socket, state: UnixSocket) -> list[bytes]:
    found: list[bytes] = []
    while True:
        try:
            data, _, flags, _ = sock.recvmsg(_MESSAGE, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return found
        if flags & socket.MSG_CTRUNC and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED):
            raise Refusal("is a unix socket with descriptors on their way in it")
        if flags & socket.MSG_TRUNC:
            raise Refusal(f"is a unix socket with a message of more than {_MESSAGE} bytes in it")
        if not data:
            # The end; or an empty datagram, which cannot be peeked past.
            if sock.type != socket.SOCK_STREAM and not state.shutdown & _RECEIVING:
                raise Refusal("is a unix socket with an empty message in it")
            return found
        source.take_room(len(data))
        found.append(data)


def _build(target: Target, entry: Entry) -> int:
    key = ("socket", entry["ino"])
    if key not in target.made:
        one, other = (sock.detach() for sock in socket.socketpair(socket.AF_UNIX, entry["type"]))
        peer = entry["peer"] or -entry["ino"]  # nobody claims the end of a peer that is closed
        target.offer(key, one)
        target.offer(("socket", peer), other)
        # What is to be read at one end is written at the other.
        target.made["writer", entry["ino"]] = target.spare(os.dup(other))
        target.made["writer", peer] = target.spare(os.dup(one))
    _fill(target.made["writer", entry["ino"]], entry["queue"])
    fd = target.claim(key)
    if fd is None:
        raise OSError(errno.EPROTO, "the image names one socket twice")
    _adjust(fd, entry)
    if entry["shutdown"] and entry["peer"]:
        # Only when both ends have their content: it would not get in any more.
        target.finally_do(lambda: _shut_down(fd, entry["shutdown"]))
    return fd


def _fill(writer: int, queue: list[bytes]) -> None:
    if not queue:
        return
    with borrow(writer) as sock:
        before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _ROOM)
        for message in queue:
            if sock.send(message, socket.MSG_DONTWAIT) != len(message):
                raise OSError(errno.ENOSPC, "the content of a socket does not fit here")
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, before // 2)


def _adjust(fd: int, entry: Entry) -> None:
    with borrow(fd) as sock:
        # The kernel doubles what is set (socket(7)).
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, entry["sndbuf"] // 2)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, entry["rcvbuf"] // 2)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, entry["passcred"])


def _shut_down(fd: int, how: int) -> None:
    with borrow(fd) as sock:
        if how & _RECEIVING:
            sock.shutdown(socket.SHUT_RD)
        if how & _SENDING:
            sock.shutdown(socket.SHUT_WR)


KINDS = (Kind("socketpair", _matches, _dump, _build),)
