# SPDX-License-Identifier: GPL-2.0-or-later
"""Tells the kernel what it must not believe any more, from a thread of its own.

A notification may have to wait for locks that a reader holds while it waits for us: sent from the trio thread it
deadlocks (measured for notify_store, documented for names). This thread waits alone.
"""

from __future__ import annotations

import logging
import threading
from errno import ENOENT
from queue import SimpleQueue
from typing import TypeAlias

import pyfuse3
import trio

log = logging.getLogger(__name__)

_RETRY_S = 0.05
"""An inode that is not there may be one whose first lookup is answered but not yet taken in by the caller's thread:
then the old attributes would stay. So those are told once more, this much later."""

# An inode, or a parent with a name, or what `flush` waits for; None ends the thread.
_Item: TypeAlias = "int | tuple[int, bytes] | trio.Event | None"


class Notifier:
    """The thread and its queue. `start` after the mount; `close` before its end."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Item] = SimpleQueue()
        # The trio thread puts, this one takes; operations on a set are atomic.
        self._queued: set[int | tuple[int, bytes]] = set()
        self._told = 0
        self._reached = 0
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None

    def start(self) -> None:
        """Starts the thread, from the trio thread."""
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, without waiting: it may wait for a caller that only the end of the mount frees."""
        self._queue.put(None)

    def attributes(self, inode: int) -> None:
        """The attributes of an inode changed."""
        self._put(inode)

    def name(self, parent: int, name: str) -> None:
        """A name means nothing, or something else, now."""
        self._put((parent, name.encode()))

    def _put(self, item: int | tuple[int, bytes]) -> None:
        if item not in self._queued:
            self._queued.add(item)
            self._told += 1
            self._queue.put(item)

    async def flush(self) -> None:
        """Waits until all that was told has reached the kernel; at most a second, should a name be in use so long."""
        if self._reached == self._told:
            return
        done = trio.Event()
        self._queue.put(done)
        with trio.move_on_after(1):
            await done.wait()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, trio.Event):
                self._on_trio(item.set)
                continue
            # Before telling: a change from here on is another one.
            self._queued.discard(item)
            try:
                self._tell(item)
            except OSError as error:
                if error.errno != ENOENT:
                    log.warning("notification of %r: %s", item, error)
                elif isinstance(item, int):
                    timer = threading.Timer(_RETRY_S, self._again, (item,))
                    timer.daemon = True
                    timer.start()
            finally:
                self._reached += 1

    def _again(self, inode: int) -> None:
        try:
            self._tell(inode)
        except OSError:
            pass  # still unknown: then nobody has it

    @staticmethod
    def _tell(item: int | tuple[int, bytes]) -> None:
        if isinstance(item, int):
            pyfuse3.invalidate_inode(item, attr_only=True)
        else:
            pyfuse3.invalidate_entry(*item)

    def _on_trio(self, function: object) -> None:
        assert self._token is not None and callable(function)
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            pass
