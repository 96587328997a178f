# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon has to know of the processes that wait in its tree: proc(5).

FUSE tells the thread that opened a file, and pyfuse3 tells nobody who reads or writes it. Where that matters (a write
that names its writer, a read that waits) the thread is looked for by what it waits in: /proc/TID/syscall names the
system call and its descriptor, fdinfo the inode behind it. Nothing here touches a file of the tree itself, which would
wait for us.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from signal import SIGCHLD, SIGCONT, SIGURG, SIGWINCH

import trio

from engine.linux.procfs import own_file, read

POLL_S = 0.1
"""Seconds between two looks at a waiting caller's signals: ^C then takes 8 ms to 100 ms, which people call at once."""

_LOOK_AGAIN_S = (0.002, 0.01, 0.05, 0.2, 0.5, 1.0)
"""Pauses between searches for a caller among all processes."""

_SHARE = 20
"""A round of looks may take one part in this many of the time, however many callers wait."""


# <asm/unistd_64.h>: read write pread64 pwrite64 readv writev sendfile splice preadv pwritev copy_file_range preadv2
# pwritev2.
_CALLS = {str(number) for number in (0, 1, 17, 18, 19, 20, 40, 275, 295, 296, 326, 327, 328)}


def _bit(signal: int) -> int:
    return 1 << (signal - 1)


# Signals whose default action is to do nothing: pending they end no wait, unless they are caught.
_HARMLESS = _bit(SIGCHLD) | _bit(SIGCONT) | _bit(SIGURG) | _bit(SIGWINCH)


def _status(tid: int) -> dict[str, str]:
    """The fields of /proc/TID/status; empty when there is no such thread."""
    try:
        text = read(own_file(tid, "status")).decode(errors="replace")
    except OSError:
        return {}
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def process_of(tid: int) -> int:
    """The process (tgid) of a thread; the number itself when it has gone."""
    return int(_status(tid).get("Tgid", tid))


def job_process_of(tid: int) -> int:
    """The pid of a thread's process in the innermost pid namespace below ours, that of a node's jobs; 0 outside it."""
    numbers = _status(tid).get("NStgid", "").split()
    return int(numbers[-1]) if len(numbers) > 1 else 0


def is_interrupted(tid: int) -> bool:
    """Whether a signal waits that would end a thread's system call; true as well when the thread has gone."""
    fields = _status(tid)
    if not fields or fields["State"].startswith(("Z", "X")):
        return True
    pending, shared, blocked, ignored, caught = (
        int(fields[name], 16) for name in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")
    )
    return bool((pending | shared) & ~blocked & ~ignored & (caught | ~_HARMLESS))


# -- who waits ---------------------------------------------------------------------------------------------------------


def _waits_for(tid: int, inode: int) -> bool:
    """Whether a thread is inside a system call on a descriptor of this inode, as told by fdinfo."""
    try:
        call = read(f"/proc/{tid}/syscall").decode().split()
    except OSError:
        return False
    # "running", or number, six arguments, sp, pc. One of the first three is the descriptor in all calls that read or
    # write; sendfile and splice may have it second or third. Other calls have other numbers there.
    if not call or call[0] not in _CALLS:
        return False
    for word in call[1:4]:
        number = int(word, 16)
        if number < 1 << 20 and _inode_of(tid, number) == inode:
            return True
    return False


def _inode_of(tid: int, fd: int) -> int:
    try:
        for line in read(f"/proc/{tid}/fdinfo/{fd}").splitlines():
            if line.startswith(b"ino:"):  # Linux 5.14
                return int(line[4:])
    except OSError:
        pass
    return -1


def _threads(pid: int) -> Iterator[int]:
    try:
        yield from map(int, os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return


def _settled(tid: int) -> bool:
    # The request may reach us before its sender has gone to sleep: some microseconds.
    try:
        return read(f"/proc/{tid}/syscall") != b"running\n"
    except OSError:
        return True


def _opener_waits(tid: int, inode: int) -> int | None:
    if _waits_for(tid, inode):
        return tid
    return next((thread for thread in _threads(process_of(tid)) if _waits_for(thread, inode)), None)


def _anyone_waits(inode: int) -> int | None:
    for name in os.listdir("/proc"):
        if name.isdigit():
            for thread in _threads(int(name)):
                if _waits_for(thread, inode):
                    return thread
    return None


async def find_waiter(opener: int, inode: int) -> int:
    """The thread that waits in a system call on an open file.

    Args:
        opener: the thread that opened it; nearly always the one.
        inode: the file's number; one of several readers of the same inode is as good as another.

    Returns:
        Its tid as this process sees it; 0 where nobody is seen to wait (io_uring, or a caller that has gone).
    """
    deadline = time.monotonic() + 0.005
    while opener:
        found = _opener_waits(opener, inode)
        if found is not None:
            return found
        if _settled(opener) or time.monotonic() > deadline:
            break
        await trio.sleep(0.0005)
    # Opened by one process and used by another: `exec 3> migrate; (echo $BASHPID >&3)`. Dear, hence in a thread, and
    # rare. Again for a while: the one that waits may not have got to sleep yet, on a machine with much to do.
    for pause in _LOOK_AGAIN_S:
        found = await trio.to_thread.run_sync(_anyone_waits, inode)
        if found is not None:
            return found
        if not _status(opener):
            break  # most likely the caller itself, killed meanwhile
        await trio.sleep(pause)
    return 0


# -- signals of those who wait -----------------------------------------------------------------------------------------


class Watch:
    """Looks after the signals of callers that wait, all in one task.

    A FUSE caller that sleeps is woken by no signal, not even SIGKILL, until its request is answered.
    """

    def __init__(self) -> None:
        self._waiting: dict[object, tuple[int, Callable[[], None]]] = {}
        self._any = trio.Event()

    def add(self, key: object, tid: int, interrupt: Callable[[], None]) -> None:
        """Has `interrupt` called, perhaps more than once, while a signal waits for `tid`."""
        self._waiting[key] = (tid, interrupt)
        self._any.set()

    def remove(self, key: object) -> None:
        """The wait is over."""
        self._waiting.pop(key, None)

    def interrupt(self, pid: int) -> None:
        """Ends the waits of a process as if it had got a signal."""
        for tid, interrupt in list(self._waiting.values()):
            if process_of(tid) == pid:
                interrupt()

    async def run(self) -> None:
        """The task."""
        while True:
            await self._any.wait()
            self._any = trio.Event()
            pause = POLL_S
            while self._waiting:
                await trio.sleep(pause)
                started = time.perf_counter()
                for key, (tid, interrupt) in list(self._waiting.items()):
                    if key in self._waiting and is_interrupted(tid):
                        interrupt()
                pause = max(POLL_S, (time.perf_counter() - started) * _SHARE)
