"""Memory of a process that runs, and has not got all of it yet: pages come when they are touched, and by and by.

Whoever touches a page that is not there waits in the kernel until we give it one (userfaultfd). What is owed moves with
mremap(2), goes with munmap(2) and MADV_DONTNEED, and is owed to a child as well when the process forks: the kernel has
each of these wait until we have heard of it. What is not owed is zero, as it would be without us.

Who dies with pages to come must take the process with him: engine/guard.py.
"""

import ctypes
import errno
import os
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from engine import guard, note
from engine import image as img
from engine.linux import process_vm, procfs, userfaultfd
from engine.linux.libc import is_error
from engine.linux.userfaultfd import Dropped, Fault, Fork, Moved
from engine.operation import sentence
from engine.owed import regions_of
from engine.owing import PART, SILENCE_S
from engine.runner import Calls
from engine.spans import Spans, cut, merge, size, within
from engine.staging import checked, unpack
from engine.stream import Stream
from engine.target import Target

_AGAIN_S: Final = 0.001  # between two attempts while the kernel is about to tell of an event


@dataclass(slots=True, eq=False)
class Space:
    """One address space: the process's, or that of a child that it has made meanwhile.

    Attributes:
        owed: what has not come; by how much further up than here it was where it comes from.
        waiting: pages that somebody waits for.
    """

    fd: int
    owed: dict[int, Spans]
    waiting: set[int] = field(default_factory=set)

    def source_of(self, page: int) -> int | None:
        """Where a page comes from; None: it is not owed."""
        for shift, spans in self.owed.items():
            if within(spans, page, page + img.PAGE):
                return page + shift
        return None

    def drop(self, start: int, end: int) -> None:
        """Nothing is owed there any more; who waits there looks again."""
        for spans in self.owed.values():
            cut(spans, start, end)
        gone = {page for page in self.waiting if start <= page < end}
        self.waiting -= gone
        for page in gone:
            userfaultfd.wake(self.fd, page, page + img.PAGE)

    def move(self, event: Moved) -> None:
        """What is owed at one place is owed at another."""
        by = event.to - event.start
        end = event.start + event.length
        for shift, spans in list(self.owed.items()):
            moving = within(spans, event.start, end)
            if moving:
                cut(spans, event.start, end)
                there = self.owed.setdefault(shift - by, [])
                there[:] = merge([*there, *((a + by, b + by) for a, b in moving)])
        self.drop(event.start, end)  # wakes

    def first_of(self, start: int, end: int) -> tuple[int, int, int] | None:
        """Of a span where the pages come from, the first part that is owed: address here, length, address there."""
        for shift, spans in self.owed.items():
            for a, b in within(spans, start - shift, end - shift):
                return a, b - a, a + shift
        return None

    def copy(self, fd: int) -> "Space":
        """The same is owed to a child, which nobody waits for yet."""
        return Space(fd, {shift: list(spans) for shift, spans in self.owed.items()})


class _Ended(Exception):
    """An address space is gone: its process has ended, or runs another program."""


class Filling:
    """All that has to come for one process.

    Attributes:
        over: everything is there, or nobody needs it any more, or it cannot come.
        failed: why it cannot come; the process has been killed.
        received: bytes of pages.
    """

    def __init__(self, target: Target, regions: Spans, owed: Spans, stream: Stream) -> None:
        """The process is stopped, and laid out. Raises OSError."""
        self.over = False
        self.failed = ""
        self.received = 0
        self._stream = stream
        self._pid = target.pid
        self._start = procfs.parse_stat(procfs.read(procfs.own_file(target.pid, "stat"))).starttime
        self._space = guard.space_of(target.pid)
        self._heard = 0.0
        first = Space(_descriptor(target), {0: list(owed)})
        self._spaces = [first]
        try:
            userfaultfd.answer(first.fd)
            for start, end in regions:
                userfaultfd.register_missing(first.fd, start, end)
            guard.hold(first.fd)
        except BaseException:
            self.drop()
            raise

    def begin(self) -> None:
        """The process is going to run: it must not go on without us from now on."""
        note.fill(self._pid, self._start, self._space)
        self._stream.let_daemon_wait(SILENCE_S)
        self._heard = time.monotonic()

    def run(self, control: socket.socket) -> None:
        """Give pages, until the daemon has something to say, or all is over."""
        poll = select.poll()
        poll.register(control, select.POLLIN)
        poll.register(self._stream.fileno(), select.POLLIN)
        known: set[int] = set()
        try:
            while not self.over:
                fds = {space.fd for space in self._spaces}
                for fd in known - fds:
                    poll.unregister(fd)
                for fd in fds - known:
                    poll.register(fd, select.POLLIN)
                known = fds
                ready = {fd for fd, _ in poll.poll(SILENCE_S * 1000)}
                if control.fileno() in ready:
                    return
                for space in [one for one in self._spaces if one.fd in ready]:
                    self._for(space, self._attend)
                if self._stream.fileno() in ready:
                    self._take()
                elif time.monotonic() - self._heard >= SILENCE_S:
                    raise TimeoutError(110, f"nothing has come for {SILENCE_S:g} s")
        except OSError as error:
            self.fail(sentence(error))

    # ---- what happens here ------------------------------------------------------------------------------------

    def _for(self, space: Space, work: Callable[[Space], None]) -> None:
        try:
            work(space)
        except _Ended:
            self._forget(space)

    def _forget(self, space: Space) -> None:
        if space in self._spaces:
            self._spaces.remove(space)
            os.close(space.fd)
        if not self._spaces:
            self._finish()

    def _attend(self, space: Space) -> None:
        for event in userfaultfd.read_events(space.fd):
            match event:
                case Fault(address):
                    self._fault(space, address // img.PAGE * img.PAGE)
                case Fork(fd):
                    self._spaces.append(space.copy(fd))
                    guard.hold(fd)
                case Moved():
                    space.move(event)
                case Dropped(start, end):
                    space.drop(start, end)

    def _fault(self, space: Space, page: int) -> None:
        source = space.source_of(page)
        if source is None:
            self._zero(space, page)
        elif page not in space.waiting:
            space.waiting.add(page)
            self._stream.send(img.frame(img.WANT, source.to_bytes(8, "little")))

    def _zero(self, space: Space, page: int) -> None:
        while True:
            try:
                userfaultfd.give_zero(space.fd, page)
                return
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOENT):  # it is there, or need not be
                    userfaultfd.wake(space.fd, page, page + img.PAGE)
                    return
                self._bear(space, error)

    def _bear(self, space: Space, error: OSError) -> None:
        """Goes on after what the kernel has said no to, where that makes sense."""
        if error.errno == errno.ESRCH:
            raise _Ended
        if error.errno != errno.EAGAIN:
            raise error
        poll = select.poll()  # something is happening to its memory: hear it first
        poll.register(space.fd, select.POLLIN)
        poll.poll(_AGAIN_S * 1000)
        self._attend(space)

    # ---- what comes -------------------------------------------------------------------------------------------

    def _take(self) -> None:
        kind, body = img.read_frame(self._stream.receive, (img.PIECE, img.LAST), img.MAX_SMALL)
        self._heard = time.monotonic()
        if kind == img.LAST:
            if any(size(spans) for space in self._spaces for spans in space.owed.values()):
                raise img.ImageError("not all has come that is owed")
            self._finish()
            return
        covers, pages = (checked(part) for part in unpack(body, 2))
        total = size(pages)
        if total > PART or len(covers) != 1:
            raise img.ImageError("a piece is too large")
        if total:
            self._stream.receive_part(memoryview(_buffer)[:total])
        self.received += total
        placed: list[Space] = []
        # A child that is made meanwhile is owed what its parent has not got by then.
        while (space := next((one for one in self._spaces if one not in placed), None)) is not None:
            placed.append(space)
            self._for(space, lambda space: self._place(space, covers[0], pages))
        if not self.over:
            self._stream.send(img.frame(img.TAKEN, b""))

    def _place(self, space: Space, covers: tuple[int, int], pages: Spans) -> None:
        at = 0
        for start, end in pages:
            self._fill(space, start, end, _buffer_address + at)
            at += end - start
        # What is covered and has no page is zero.
        while (part := space.first_of(*covers)) is not None:
            address, length, _ = part
            self._clear(space, address, length)
            for page in sorted(one for one in space.waiting if address <= one < address + length):
                space.waiting.discard(page)
                self._zero(space, page)

    def _fill(self, space: Space, start: int, end: int, buffer: int) -> None:
        most = end - start
        while (part := space.first_of(start, end)) is not None:
            address, length, source = part
            length = min(length, most)
            try:
                done = userfaultfd.give(space.fd, address, buffer + source - start, length)
            except OSError as error:
                if error.errno == errno.ENOENT and length > img.PAGE:
                    most = max(length // 2 // img.PAGE * img.PAGE, img.PAGE)  # it may be in two mappings
                    continue
                if error.errno not in (errno.ENOENT, errno.EEXIST):
                    self._bear(space, error)
                    continue
                done = img.PAGE  # it is gone, or there
                userfaultfd.wake(space.fd, address, address + done)
            most = end - start
            self._clear(space, address, done)
            space.waiting -= set(range(address, address + done, img.PAGE))

    @staticmethod
    def _clear(space: Space, address: int, length: int) -> None:
        for spans in space.owed.values():
            cut(spans, address, address + length)

    # ---- the end ----------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self.over = True
        self.drop()
        note.fill(0)
        try:
            self._stream.send(img.frame(img.LAST, b""))
        except OSError:
            pass  # the source has gone, and nothing is needed of it
        self._stream.close()

    def fail(self, why: str) -> None:
        """What is owed does not come: the process ends, and those that it has forked meanwhile."""
        if self.over:
            return
        self.over, self.failed = True, why
        guard.end(self._pid, self._start, self._space)
        self.drop()
        note.fill(0)
        self._stream.close()

    def drop(self) -> None:
        """Nobody waits for anything any more: all is there, or the process is gone, or has never run."""
        for space in self._spaces:
            os.close(space.fd)
        self._spaces = []
        guard.release()


_buffer = bytearray(PART)
_buffer_address = ctypes.addressof((ctypes.c_char * PART).from_buffer(_buffer))


def begin(target: Target, image: img.Image, owed: Spans, stream: Stream) -> Filling:
    """Have a stopped process, which has its mappings, wait for this memory. Raises ImageError, OSError."""
    return Filling(target, regions_of(image, owed), owed, stream)


def _descriptor(target: Target) -> int:
    """A userfaultfd of the process's memory, which the process itself does not have."""
    calls = Calls(target.injection)
    calls.add("userfaultfd", userfaultfd.ANSWERED, must=False)
    made = calls.run()[0]
    if is_error(made):  # it has lost its rights, as the ghost of an ordinary user
        device = os.open(userfaultfd.DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            number = target.pass_fds([device])[0]
        finally:
            os.close(device)
        calls = Calls(target.injection)
        calls.add("ioctl", number, userfaultfd.NEW, userfaultfd.ANSWERED, label="userfaultfd")
        made = calls.run()[0]
    try:
        return process_vm.pidfd_getfd(target.pidfd, made)
    finally:
        calls = Calls(target.injection)
        calls.add("close", made)
        calls.run()
