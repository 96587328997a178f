"""Which pids each node hands out itself, and how a process of the master gets one of them.

Pids are one space for the whole machine, and several clusters may live on it: a file that all their masters lock says
who has which part. Locks of a master that dies are free at once, but what its nodes had is kept for the next one.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from bpfs import log
from bpfs.errors import BpfsError
from bpfs.pidspace import BLOCK_BASE, BLOCK_SIZE, PID_MAX
from bpfs.rundir import BASE

PID_LIMIT = 4 << 20
"""The kernel's PID_MAX_LIMIT on 64-bit machines (linux/threads.h)."""
BLOCKS = (PID_LIMIT - BLOCK_BASE) // BLOCK_SIZE

LOCKS = Path("/run/bpfs-pids")
_RETRY = 0.001  # seconds; pid_max is raised for a few milliseconds at most
_PATIENCE = 2.0

_log = log.get("nodes")


class Blocks:
    """The master's part in the machine's pids."""

    def __init__(self) -> None:
        self._fd = os.open(LOCKS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._blocks: dict[int, int] = {}
        self._lock = trio.Semaphore(1)  # what has raised it may put it back in another task
        self._file: Path | None = None

    def remember(self, path: Path, afresh: bool) -> None:
        """Keeps in a file (`blocks` of the run directory) which block each node has: a line ``NODE BLOCK``.

        Args:
            afresh: what an earlier master has left there is void; else its nodes have their blocks again.
        """
        self._file = path
        if afresh:
            path.unlink(missing_ok=True)
            return
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            return
        for number, index in (map(int, line.split()) for line in lines):
            self._blocks[number] = index
            if not self._try_lock(index):  # jobs have its pids, whoever was quicker
                _log.warning("node %d shares its block of pids with another cluster's", number)

    def of(self, number: int) -> range:
        """The pids that a node hands out itself: the same whenever it is asked for again."""
        index = self._blocks.get(number)
        if index is None:
            index = self._blocks[number] = self._claim(number)
            if self._file is not None:
                with open(self._file, "a") as file:
                    file.write(f"{number} {index}\n")
        first = BLOCK_BASE + index * BLOCK_SIZE
        return range(first, first + BLOCK_SIZE)

    def _claim(self, number: int) -> int:
        mine, kept = set(self._blocks.values()), self._kept()
        wanted = [(number + at) % BLOCKS for at in range(BLOCKS)]
        # Those that a master has left who will have no successor are better than none.
        for index in [*(i for i in wanted if i not in kept), *(i for i in wanted if i in kept)]:
            if index not in mine and self._try_lock(index):
                return index
        _log.warning("all blocks of pids are taken: node %d shares its own with another cluster's", number)
        return number % BLOCKS

    def _kept(self) -> set[int]:
        """Blocks of other clusters, whose masters may have died, and whose jobs live on for a while."""
        kept: set[int] = set()
        for path in BASE.glob("*/blocks"):
            if path != self._file:
                with suppress(OSError, ValueError):
                    kept.update(int(line.split()[1]) for line in path.read_text().splitlines())
        return kept

    def _try_lock(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return False
        return True

    @asynccontextmanager
    async def raised(self) -> AsyncIterator[None]:
        """Lets a process be made with any pid (clone3's set_tid), for as short as can be.

        Native pids stay below the usual limit: the kernel goes on where it was, and wraps around once this is over.

        Raises:
            BpfsError: EBUSY, another master does not let go; or the errno of writing pid_max.
        """
        async with self._lock:
            lock = await _lock_pid_max()
            before = None
            try:
                before = self._raise()
                yield
            finally:
                if before is not None:
                    _put_back(before)
                os.close(lock)

    def _raise(self) -> int | None:
        # A master that died in here has left its word of how it was.
        now, left = int(PID_MAX.read_text()), os.pread(self._fd, 16, 0).strip(b"\0\n ")
        if now >= PID_LIMIT and not left:
            return None
        before = now if now < PID_LIMIT else int(left)
        os.pwrite(self._fd, b"%-15d\n" % before, 0)
        try:
            _write_pid_max(PID_LIMIT)
        except OSError as error:
            raise BpfsError(error.errno or errno.EIO, f"pid_max cannot be raised: {error.strerror}") from error
        return before

    def close(self) -> None:
        """Lets go of every block."""
        os.close(self._fd)


async def _lock_pid_max() -> int:
    # The lock of bpfs.pidspace, which changes it as well.
    lock = os.open(BASE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with trio.fail_after(_PATIENCE):
            while not _try_flock(lock):
                await trio.sleep(_RETRY)
    except BaseException as error:
        os.close(lock)
        if isinstance(error, trio.TooSlowError):
            raise BpfsError(errno.EBUSY, "another master does not let go of pid_max") from None
        raise
    return lock


def _try_flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _put_back(value: int) -> None:
    try:
        _write_pid_max(value)
    except OSError as error:
        _log.error("pid_max cannot be put back to %d: %s", value, error.strerror)


def _write_pid_max(value: int) -> None:
    PID_MAX.write_text(f"{value}\n")
