"""Which directories nodes know something of, and what changes there: inotify(7) on the master."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from errno import ENOSPC

from bpfs import log
from bpfs.view.files import Files
from bpfs.view.protocol import Change
from engine.linux import inotify

_log = log.get("view")

_EVENT = struct.Struct("=iIII")

# <linux/inotify.h>
_MODIFY, _ATTRIB, _CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x4, 0x8, 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF, _OVERFLOW, _IGNORED, _ISDIR = 0x400, 0x800, 0x4000, 0x8000, 0x40000000
_ONLYDIR = 0x01000000
_ENTRIES = _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
_WANTED = _ENTRIES | _MODIFY | _ATTRIB | _CLOSE_WRITE | _DELETE_SELF | _MOVE_SELF | _ONLYDIR

Tell = Callable[[str, str, Change], None]


class Watches:
    """One inotify queue for all nodes. `run` is for a thread of its own; `add` is safe for threads.

    Args:
        tell: called with directory, name and kind of each change. The directory "/" with `Change.ALL`: events were
            lost.
    """

    def __init__(self, files: Files, tell: Tell) -> None:
        self._files = files
        self._tell = tell
        self._fd = inotify.create()
        self._lock = threading.Lock()
        self._paths: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._full = False

    def add(self, path: str) -> bool:
        """Have changes in a directory told from now on; False where it cannot be watched."""
        if path in self._numbers:
            return True
        try:
            fd = self._files.open_directory(path)
        except OSError:
            return False
        try:
            with self._lock:
                number = inotify.watch(self._fd, fd, _WANTED)
                self._paths[number] = path
                self._numbers[path] = number
        except OSError as error:
            if error.errno == ENOSPC and not self._full:
                self._full = True
                _log.warning("no more directories can be watched for nodes: raise fs.inotify.max_user_watches")
            return False
        finally:
            os.close(fd)
        return True

    def run(self) -> None:
        """Tell for ever."""
        while True:
            data = os.read(self._fd, 1 << 16)
            at = 0
            told: set[tuple[str, str, Change]] = set()
            while at < len(data):
                number, mask, _, length = _EVENT.unpack_from(data, at)
                name = os.fsdecode(data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0"))
                at += _EVENT.size + length
                change = self._change(number, mask, name)
                # A file that is written to tells so with every write.
                if change is not None and change not in told:
                    told.add(change)
                    self._tell(*change)

    def _change(self, number: int, mask: int, name: str) -> tuple[str, str, Change] | None:
        if mask & _OVERFLOW:
            return "/", "", Change.ALL
        with self._lock:
            path = self._paths.get(number)
            if path is None:
                return None
            if mask & (_IGNORED | _DELETE_SELF | _MOVE_SELF):
                self._paths.pop(number, None)
                self._numbers.pop(path, None)
                return path, "", Change.ALL
        if mask & _ENTRIES:
            return path, name, Change.ENTRY
        if not name:
            return path, "", Change.CONTENT
        return path, name, Change.CONTENT
