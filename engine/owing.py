"""Memory that a process has left behind, and that is sent after it: what it waits for first, then the rest in order.

The process itself is gone by then, killed or turned into its ghost. Its memory stays as long as somebody uses it, and
what uses it is a read of /proc/PID/mem that we let hang: the buffer that it fills is a page of ours that nobody gives
(userfaultfd). That costs nothing, whatever the size, and there is no process that could run, be seen or be signalled.
Its page tables and pages are read as before, by descriptors that were opened in time.
"""

import contextlib
import ctypes
import mmap
import os
import select
import socket
import threading
import time
from dataclasses import dataclass
from typing import Final

import msgpack

from engine import faults
from engine import image as img
from engine.freeze import Frozen
from engine.linux import pagemap, userfaultfd
from engine.linux.libc import syscall
from engine.linux.x86_64 import NR
from engine.spans import Spans, both, cut, merge, of_runs, size, within
from engine.stream import Stream

PART: Final = 256 << 10  # bytes of pages in one piece
_AHEAD: Final = 4  # pieces on their way: who waits for a page waits for these at most
_NEAR: Final = 64 << 10  # what is asked for comes with its neighbours; aligned
_LOOK: Final = 256 << 20  # bytes of address space that are looked through at a time: 2 ms
_GRACE_S: Final = 0.02  # in which the process begins to run, and its first pages are asked for, before the rest goes
_BEGUN_WITHIN_S: Final = 5.0
SILENCE_S: Final = 60.0  # without a word from the other side, whose end or loss shows sooner


class Hold:
    """What keeps the memory of a process, from `__init__` to `close`, whatever becomes of the process."""

    def __init__(self, memory: int, address: int) -> None:
        """Args:
        memory: its /proc/PID/mem, a descriptor of ours from now on.
        address: of a page that it has.

        Raises:
            OSError: the kernel cannot.
        """
        self._memory = memory
        self._page = mmap.mmap(-1, img.PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._fd = syscall(NR["userfaultfd"], userfaultfd.ANSWERED)
        try:
            userfaultfd.answer(self._fd)
            base = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
            userfaultfd.register_missing(self._fd, base, base + img.PAGE)
            self._thread = threading.Thread(target=self._read, args=(memoryview(self._page), address), daemon=True)
            self._thread.start()
            self._wait_begun()
        except BaseException:
            self.close()
            raise

    def _read(self, page: memoryview, address: int) -> None:
        with contextlib.suppress(OSError), page:
            os.preadv(self._memory, [page], address)

    def _wait_begun(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(_BEGUN_WITHIN_S * 1000) or not userfaultfd.read_events(self._fd):
            raise OSError(14, "the memory of the process cannot be kept")

    def close(self) -> None:
        """Let it go."""
        if self._fd >= 0:
            os.close(self._fd)  # the read gets its page, and comes to its end
            self._fd = -1
            self._thread.join()
            os.close(self._memory)


@dataclass(slots=True)
class Owing:
    """The memory that one process has left behind.

    Attributes:
        owed: what may be asked for, and has not been sent.
        over: nothing is owed any more, or there is nobody to send it to.
        sent: bytes of pages.
    """

    owed: Spans
    _memory: int
    _table: int
    _hold: Hold
    _known: Spans | None  # where its pages are; None: PAGEMAP_SCAN tells
    stream: Stream | None = None
    over: bool = False
    sent: int = 0
    failed: str = ""
    _found: Spans | None = None  # pages from `_upto` back that have not been sent
    _upto: int = 0
    _under_way: int = 0  # pieces
    _said_last: bool = False
    _heard: float = 0.0
    _began: float = 0.0

    @classmethod
    def begin(cls, frozen: Frozen, owed: Spans, known: Spans | None) -> "Owing":
        """While it still stands there. Raises OSError."""
        folder = frozen.live
        memory = os.open(f"{folder}/mem", os.O_RDONLY | os.O_CLOEXEC)
        table = -1
        try:
            table = os.open(f"{folder}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            held = os.open(f"{folder}/mem", os.O_RDONLY | os.O_CLOEXEC)
            return cls(list(owed), memory, table, Hold(held, frozen.threads[0].registers.stack & -img.PAGE), known)
        except BaseException:
            for fd in (memory, table):
                if fd >= 0:
                    os.close(fd)
            raise

    def run(self, control: socket.socket) -> None:
        """Send, until the daemon has something to say, or all is over."""
        stream = self.stream
        assert stream is not None
        self._began = self._began or time.monotonic()
        self._heard = self._heard or self._began
        stream.let_daemon_wait(SILENCE_S)
        poll = select.poll()
        poll.register(control, select.POLLIN)
        poll.register(stream.fileno(), select.POLLIN)
        try:
            while not self.over:
                may_send = self._under_way < _AHEAD and not self._said_last
                patience_s = 0 if may_send else SILENCE_S
                if may_send and (time.monotonic() < self._began + _GRACE_S or faults.is_waited_for("owed")):
                    may_send, patience_s = False, _GRACE_S / 4  # only what is asked for
                ready = {fd for fd, _ in poll.poll(patience_s * 1000)}
                if control.fileno() in ready:
                    return
                if stream.fileno() in ready:
                    self._listen(stream)
                elif may_send:
                    self._send_next(stream)
                elif patience_s == SILENCE_S and time.monotonic() - self._heard >= SILENCE_S:
                    raise TimeoutError(110, f"no answer from the other node for {SILENCE_S:g} s")
        except OSError as error:
            self._end(str(error.strerror))

    def _listen(self, stream: Stream) -> None:
        self._heard = time.monotonic()
        if stream.is_closed():
            self._end("the process has ended, or could not go on")
            return
        kind, body = img.read_frame(stream.receive, (img.WANT, img.TAKEN, img.LAST), img.MAX_SMALL)
        if kind == img.TAKEN:
            self._under_way -= 1
        elif kind == img.LAST:
            self._end("")
        else:
            near = int.from_bytes(body, "little") // _NEAR * _NEAR
            for start, end in within(self.owed, near, near + _NEAR):
                self._send(stream, start, end, self._pages(start, end))

    def _send_next(self, stream: Stream) -> None:
        if not self.owed:
            self._said_last = True
            stream.send(img.frame(img.LAST, b""))
            return
        start, last = self.owed[0]
        if self._found is None or start >= self._upto:
            self._upto = min(last, start + _LOOK)
            self._found = self._pages(start, self._upto)
        part: Spans = []
        room = PART
        end = min(last, self._upto)
        for a, b in within(self._found, start, end):
            part.append((a, min(b, a + room)))
            room -= part[-1][1] - a
            if not room:
                end = part[-1][1]
                break
        cut(self._found, start, end)
        self._send(stream, start, end, part)

    def _pages(self, start: int, end: int) -> Spans:
        if self._known is not None:
            return within(self._known, start, end)
        return of_runs(pagemap.private_runs(self._table, start, end))

    def _send(self, stream: Stream, start: int, end: int, pages: Spans) -> None:
        cut(self.owed, start, end)
        total = size(pages)
        view = memoryview(_buffer)[:total]
        at = 0
        for first, last in pages:
            if os.preadv(self._memory, [view[at : at + last - first]], first) != last - first:
                raise OSError(5, "the memory that the process has left behind cannot be read")
            at += last - first
        stream.send(img.frame(img.PIECE, msgpack.packb([[(start, end)], pages])), more=bool(pages))
        if total:
            stream.send_part(view)
        self.sent += total
        self._under_way += 1

    def _end(self, why: str) -> None:
        self.failed, self.over = why, True
        self.close()

    def close(self) -> None:
        """Give the memory up; who waits for some of it learns that from the end of the connection."""
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.close()
        self._hold.close()
        if self._memory >= 0:
            os.close(self._memory)
            os.close(self._table)
            self._memory = self._table = -1


_buffer = bytearray(PART)


def known_pages(runs: list[tuple[int, int]], owed: Spans) -> Spans:
    """Of (address, length) of pages, what is owed: for kernels that cannot tell later."""
    return both(merge((address, address + length) for address, length in runs), owed)
