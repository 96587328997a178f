"""The TCP connection between two workers, given up as soon as the daemon that drives this one is gone."""

import hmac
import select
import socket
import time
from typing import Final

from engine import packing
from engine.linux import packets
from engine.packing import Packer

CONNECT_TIMEOUT_S: Final = 10.0
_BUFFER: Final = 4 << 20
SEND: Final = (32, socket.SO_SNDBUF)  # SO_SNDBUFFORCE of <asm-generic/socket.h>
RECEIVE: Final = (33, socket.SO_RCVBUF)  # SO_RCVBUFFORCE
_TOKEN_PATIENCE_S: Final = 2.0


class Aborted(OSError):
    """The control socket ended, or the daemon has said something else than what it is expected to say next."""

    def __init__(self) -> None:
        super().__init__(125, "the move was called off")


class Stream:
    """A non-blocking connection with a deadline on silence and an eye on the control socket.

    Args:
        silence_s: longest wait for the peer to take or give anything.

    Attributes:
        word: the operation that the daemon may ask for meanwhile; empty: none.
    """

    def __init__(self, sock: socket.socket, control: socket.socket | None, silence_s: float) -> None:
        self._sock, self._control, self._silence = sock, control, silence_s
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.word = ""
        self.packer: Packer | None = None  # of parts that are sent
        self.packed = False  # parts that come are

    def send_part(self, part: memoryview) -> None:
        """Send a part of the pages. Raises as `send`."""
        if self.packer is None:
            self.send(part)
        else:
            self.packer.send(part, self._sock, self.send)

    def receive_part(self, part: memoryview) -> None:
        """Fill a part of the pages. Raises as `receive_into`; ImageError."""
        if self.packed:
            packing.receive(part, self.receive_into)
        else:
            self.receive_into(part)

    def send(self, data: bytes | memoryview, more: bool = False) -> None:
        """Send all; `more`: something follows at once. Raises Aborted, TimeoutError or OSError."""
        view = memoryview(data)
        flags = socket.MSG_NOSIGNAL | (socket.MSG_MORE if more else 0)
        while view:
            try:
                view = view[self._sock.send(view, flags) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)

    def receive_into(self, view: memoryview) -> None:
        """Fill a buffer. Raises ConnectionResetError at the end of the stream, else as `send`."""
        while view:
            try:
                count = self._sock.recv_into(view)
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            if not count:
                raise ConnectionResetError(104, "the other node closed the connection")
            view = view[count:]

    def receive(self, length: int) -> bytes:
        """Exactly `length` bytes, fewer only at the end of the stream."""
        parts = []
        while length:
            try:
                part = self._sock.recv(min(length, 1 << 20))
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            if not part:
                break
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def fileno(self) -> int:
        """For poll(2)."""
        return self._sock.fileno()

    def let_daemon_wait(self, silence_s: float) -> None:
        """From now on the control socket is the caller's to look at, and not what ends a wait."""
        self._control, self._silence = None, silence_s

    def wait_at_most(self, seconds: float) -> None:
        """Another longest wait from now on."""
        self._silence = seconds

    def has_ended(self) -> bool:
        """Whether the peer has closed the connection (or said something that nobody asked for)."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def is_closed(self) -> bool:
        """Whether the peer has closed the connection, and all that it had said before has been read."""
        try:
            return not self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _wait(self, event: int) -> None:
        wait_for(self._sock, event, self._control, self._silence, self.word)

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()


def wait_for(sock: socket.socket, event: int, control: socket.socket | None, timeout: float, word: str = "") -> None:
    """Wait until a socket is ready.

    Raises:
        Aborted: the daemon said something first, and that is not `word`; or it is gone.
        TimeoutError: neither happened.
    """
    poll = select.poll()
    poll.register(sock, event)
    if control is not None:
        poll.register(control, select.POLLIN)
    ready = poll.poll(timeout * 1000)
    if not ready:
        raise TimeoutError(110, f"no answer from the other node for {timeout:g} s")
    if control is not None and any(fd == control.fileno() for fd, _ in ready):
        if not word or packets.next_operation(control) != word:
            raise Aborted
        poll.modify(control, 0)  # its end alone
        ready = poll.poll(timeout * 1000)
        if not ready:
            raise TimeoutError(110, f"no answer from the other node for {timeout:g} s")
        if any(fd == control.fileno() for fd, _ in ready):
            raise Aborted


def widen(sock: socket.socket, option: tuple[int, int]) -> None:
    """Give a socket buffers for what one side sends while the other is still busy; before it connects or listens.

    Args:
        option: SEND or RECEIVE.
    """
    forced, plain = option
    try:
        sock.setsockopt(socket.SOL_SOCKET, forced, _BUFFER)
    except PermissionError:  # without CAP_NET_ADMIN: as much as net.core.*mem_max allows
        sock.setsockopt(socket.SOL_SOCKET, plain, _BUFFER)


def connect(host: str, port: int, control: socket.socket | None) -> socket.socket:
    """Connect within CONNECT_TIMEOUT_S. Raises Aborted, OSError."""
    family, kind, proto, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        widen(sock, SEND)
        if (code := sock.connect_ex(address)) not in (0, 115):
            raise OSError(code, f"cannot connect to {host}:{port}")
        wait_for(sock, select.POLLOUT, control, CONNECT_TIMEOUT_S)
        if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, f"cannot connect to {host}:{port}")
    except BaseException:
        sock.close()
        raise
    return sock


def accept(listener: socket.socket, token: bytes, control: socket.socket | None, timeout: float) -> socket.socket:
    """Accept the one connection that knows the token; others are dropped. Raises Aborted, TimeoutError."""
    deadline = time.monotonic() + timeout
    listener.setblocking(False)
    while True:
        wait_for(listener, select.POLLIN, control, max(deadline - time.monotonic(), 0))
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            continue
        try:
            sock.setblocking(False)
            got = b""
            while len(got) < len(token):
                # A stranger that says nothing must not hold up the real one for long.
                patience = min(max(deadline - time.monotonic(), 0), _TOKEN_PATIENCE_S)
                wait_for(sock, select.POLLIN, control, patience)
                part = sock.recv(len(token) - len(got))
                if not part:
                    break
                got += part
            if hmac.compare_digest(got, token):
                return sock
        except Aborted:
            sock.close()
            raise
        except OSError:
            pass
        sock.close()
