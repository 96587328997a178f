"""Compression of pages on slow links, by LZ4: only where the link is what a copy waits for, and only while it pays.

A packed connection says so by frame(PACKED); each part of its pages then comes after a u32, the bytes that follow:
LZ4's, or 0 for a part as it is. The sender judges for each part by what the kernel measures of the connection (tcp(7),
TCP_INFO).
"""

import ctypes
import functools
import socket
import struct
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from engine.image import ImageError

WHOLE: Final = 4 << 20  # bytes of a process below which all of it fits into the buffers of its connection
LEAST: Final = 64 << 10  # bytes of a part; a smaller one is sent as it is
_BACKLOG: Final = 512 << 10  # bytes that wait to be sent: the link is slower than the process is read
_MARGIN: Final = 2.0  # so much faster than the link packing must be: unpacking and the process want CPU, too
_GAIN: Final = 0.8  # most of a part's size that its packed form may have
_MOST_SKIPPED: Final = 32  # parts that are sent as they are after one that could not be packed
_FIRST_GUESS: Final = 300e6  # bytes a second that are packed, until it is known: 200 to 700 MB/s on usual machines
_SIZE: Final = struct.Struct("<I")
_TCP_INFO_BYTES: Final = 192
_WINDOW_S: Final = 0.02  # of a busy link before it is judged: a connection takes some round trips to get fast
_HELD_UP: Final = 0.2  # share of it that the receiver may have had no room


@functools.cache
def _library() -> ctypes.CDLL | None:
    # By hand, not by the module `lz4`: a node's image has room for the library (60 kB), not for what comes with that.
    try:
        lz4 = ctypes.CDLL("liblz4.so.1")
    except OSError:
        return None
    lz4.LZ4_compress_default.argtypes = lz4.LZ4_decompress_safe.argtypes = (
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int,
    )  # fmt: skip
    return lz4


def works() -> bool:
    """Whether this machine can pack and unpack."""
    return _library() is not None


class Sample(NamedTuple):
    """What the kernel says of a connection at some moment (struct tcp_info of <linux/tcp.h>), since it began.

    Its own tcpi_delivery_rate is no use: short bursts make it hundreds of times what a shaped link carries.
    """

    when: float  # seconds
    waiting: int  # bytes that have still to be sent
    arrived: int  # bytes
    full: float  # seconds that the receiver had no room


def sample(sock: socket.socket) -> Sample:
    """Of a TCP connection. Raises OSError."""
    now, info = time.monotonic(), sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(info) < _TCP_INFO_BYTES:  # before Linux 4.10
        return Sample(now, 0, 0, 0.0)
    # tcpi_bytes_acked, tcpi_notsent_bytes, tcpi_rwnd_limited (in us)
    (arrived,), (waiting,) = struct.unpack_from("<Q", info, 120), struct.unpack_from("<I", info, 144)
    (full,) = struct.unpack_from("<Q", info, 176)
    return Sample(now, waiting, arrived, full / 1e6)


def is_worthwhile(before: Sample, now: Sample, speed: float) -> bool:
    """Whether to pack, at `speed` bytes a second, what goes over a link that was busy from one moment to the other."""
    elapsed = now.when - before.when
    held_up = (now.full - before.full) / elapsed  # it is the receiver, who would have more to do
    return held_up < _HELD_UP and (now.arrived - before.arrived) / elapsed * _MARGIN < speed


class Packer:
    """The sending side of one connection.

    Attributes:
        speed: bytes a second that are packed.
    """

    def __init__(self) -> None:
        self.speed = _FIRST_GUESS
        self._room = ctypes.create_string_buffer(1)
        self._skip = self._skipped = 0
        self._busy: Sample | None = None  # since then the link has been busy
        self._pays = False

    def send(self, part: memoryview, sock: socket.socket, send: Callable[..., object]) -> None:
        """Send one part, of contiguous and writable memory. Raises as `send`, which is a Stream's; OSError."""
        packed = self._packed(part) if len(part) >= LEAST and self._should(sock) else None
        send(_SIZE.pack(0 if packed is None else len(packed)), more=True)
        send(part if packed is None else packed)

    def _should(self, sock: socket.socket) -> bool:
        now = sample(sock)
        if now.waiting < _BACKLOG:
            self._busy, self._pays = None, False
        elif self._busy is None:
            self._busy = now
        elif now.when - self._busy.when >= _WINDOW_S:
            self._pays = is_worthwhile(self._busy, now, self.speed)
            self._busy = now
        if self._skip:
            self._skip -= 1
            return False
        return self._pays

    def _packed(self, part: memoryview) -> memoryview | None:
        library = _library()
        assert library is not None
        most = int(len(part) * _GAIN)
        if len(self._room) < most:
            self._room = ctypes.create_string_buffer(most)
        began = time.perf_counter()
        source = ctypes.addressof(ctypes.c_char.from_buffer(part))
        size = library.LZ4_compress_default(source, ctypes.addressof(self._room), len(part), most)
        self.speed += (len(part) / max(time.perf_counter() - began, 1e-6) - self.speed) / 4
        if size <= 0:  # it does not fit: there is too little to gain
            self._skipped = self._skip = min(max(1, 2 * self._skipped), _MOST_SKIPPED)
            return None
        self._skipped = 0
        return memoryview(self._room)[:size]


def receive(part: memoryview, receive_into: Callable[[memoryview], None]) -> None:
    """Fill one part, of contiguous memory. Raises as `receive_into`; ImageError."""
    head = bytearray(_SIZE.size)
    receive_into(memoryview(head))
    (size,) = _SIZE.unpack(head)
    if not size:
        receive_into(part)
        return
    library = _library()
    if size > len(part) or library is None:
        raise ImageError("a packed part is longer than what it stands for")
    packed = bytearray(size)
    receive_into(memoryview(packed))
    source = ctypes.addressof(ctypes.c_char.from_buffer(packed))
    target = ctypes.addressof(ctypes.c_char.from_buffer(part))
    if library.LZ4_decompress_safe(source, target, size, len(part)) != len(part):
        raise ImageError("a packed part is damaged")
