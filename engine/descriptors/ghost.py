"""Home-coming: the ghost has kept every descriptor of the process as it left, shared with whoever shared them.

A description of the image that is on the same object is taken over from the ghost, so that a shell's shared offset, a
terminal or a pipe is the very one it was; whatever else there is gets made afresh.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Mapping

from engine.descriptors import locks
from engine.descriptors.model import Entry, boot_id
from engine.linux import process_vm, procfs, statx

_KEPT = ("file", "directory", "device")

# <asm-generic/ioctls.h>, <asm-generic/termbits.h>
_TIOCGLCKTRMIOS = 0x5456
_TIOCSLCKTRMIOS = 0x5457
_EXTPROC = 0o200000
_TERMIOS_BYTES = 36
_LFLAG_OFFSET = 12


class Ghost:
    """The descriptors of a ghost process, a context manager. Without `numbers` there is no ghost, and it has none.

    Args:
        pid: host pid of the ghost.
        numbers: key of an external -> the ghost's descriptor number; a missing key means the external's own number.
    """

    def __init__(self, pid: int, numbers: Mapping[int, int] | None) -> None:
        self._pid = pid
        self._numbers = numbers
        self._pidfd = -1

    def __enter__(self) -> Ghost:
        if self._numbers is not None:
            self._pidfd = process_vm.pidfd_open(self._pid)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)

    def adopt(self, entry: Entry) -> int | None:
        """The ghost's own open description for an entry, at the entry's offset; None when it must be made afresh.

        Raises:
            OSError: an external that the ghost does not have.
        """
        if self._numbers is None:
            return None
        if entry["kind"] == "external":
            return self._take_external(entry, self._numbers)
        if entry.get("of", entry["kind"]) not in _KEPT or entry.get("boot", boot_id()) != boot_id():
            return None
        for number, _ in entry["fds"]:
            if self._is_same(number, entry):
                return self._take(number, entry)
        return None

    def _take_external(self, entry: Entry, numbers: Mapping[int, int]) -> int:
        wanted = numbers.get(entry["key"])
        candidates = [fd for fd, _ in entry["fds"]] if wanted is None else [wanted]
        for number in candidates:
            try:
                fd = process_vm.pidfd_getfd(self._pidfd, number)
                _lock_extproc(fd)
                return fd
            except OSError as error:
                if error.errno != errno.EBADF:
                    raise
        raise OSError(errno.EBADF, f"the ghost has no descriptor {candidates[0]} to give back")

    def _is_same(self, number: int, entry: Entry) -> bool:
        try:
            status = statx.of_path(b"/proc/%d/fd/%d" % (self._pid, number))
            if status.ino != entry["ino"] or status.dev != entry["dev"]:
                return False
            flags = int(self._info(number).split(b"\nflags:", 1)[1].split(b"\n", 1)[0], 8)
        except OSError:
            return False
        # What fcntl cannot change afterwards must be right already.
        fixed = os.O_ACCMODE | os.O_SYNC | os.O_DSYNC | os.O_PATH
        return not (flags ^ entry["flags"]) & fixed

    def _info(self, number: int) -> bytes:
        return procfs.read(f"/proc/{self._pid}/fdinfo/{number}")

    def _take(self, number: int, entry: Entry) -> int:
        fd = process_vm.pidfd_getfd(self._pidfd, number)
        if "pos" in entry and not entry["flags"] & os.O_PATH:
            os.lseek(fd, entry["pos"], os.SEEK_SET)
        self._take_locks(number, entry)
        return fd

    def _take_locks(self, number: int, entry: Entry) -> None:
        # POSIX locks, which the ghost has held all the time, go when it closes what else it has on the file.
        held = [lock for lock in locks.of_info(self._info(number)) if lock[0] == "POSIX"]
        known = entry.get("locks", [])
        if held:
            entry["locks"] = [*known, *(lock for lock in held if lock not in known)]


def take_from(pid: int, number: int) -> int:
    """What a ghost has for a process that comes home, maybe another than its own. Raises OSError."""
    ghost = process_vm.pidfd_open(pid)
    try:
        fd = process_vm.pidfd_getfd(ghost, number)
    finally:
        os.close(ghost)
    _lock_extproc(fd)
    return fd


def _lock_extproc(fd: int) -> None:
    # A node's pseudo-terminals are in EXTPROC mode (bpfs/procs/csrc/relay_tty.c). A program that came to know the
    # settings there and restores them here must not take the real terminal's echo and line editing away.
    try:
        locked = bytearray(fcntl.ioctl(fd, _TIOCGLCKTRMIOS, bytes(_TERMIOS_BYTES)))
        (flags,) = struct.unpack_from("<I", locked, _LFLAG_OFFSET)
        struct.pack_into("<I", locked, _LFLAG_OFFSET, flags | _EXTPROC)
        fcntl.ioctl(fd, _TIOCSLCKTRMIOS, bytes(locked))
    except OSError:
        pass  # no terminal, or one that has hung up
