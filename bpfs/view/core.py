"""What all parts of the view's daemon share: the device, the inodes, and the requests under way.

Locking: `lock` guards all of it. Nobody holds it while the network is waited for, nor while the kernel is notified: a
notification may wait for a look-up that needs the lock.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from errno import EINTR, EIO
from pathlib import Path
from typing import TypeAlias

from bpfs.view import fuse
from bpfs.view.fuse import Device
from bpfs.view.nodes import Node, Nodes
from bpfs.view.remote import Remote


@dataclass(slots=True)
class Request:
    """One request of the kernel's; `deadline` (monotonic seconds) once it is under way to the master."""

    op: int
    unique: int
    node: int
    body: bytes
    deadline: float = 0.0


Quick: TypeAlias = Callable[[Request], bool]
"""Answers a request at once, with the lock held; False: it cannot without the network."""
Slow: TypeAlias = Callable[[Request, Remote], None]
"""Answers a request in a worker; an OSError that it raises is the answer."""


class Core:
    """See the module's head.

    Args:
        timeout: seconds that the master may take.
    """

    def __init__(self, device: Device, journal: Path, timeout: float) -> None:
        self.device = device
        self.timeout = timeout
        self.lock = threading.RLock()
        self.nodes = Nodes(journal)
        self.queue: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self.pending: dict[int, Request] = {}

    def node(self, request: Request) -> Node:
        """The inode that a request is about."""
        return self.nodes.by_number[request.node]

    def child(self, request: Request) -> str:
        """The path that a look-up is about."""
        return self.node(request).path.rstrip("/") + "/" + os.fsdecode(request.body.rstrip(b"\0"))

    def send_far(self, request: Request, data: bytes) -> None:
        """Give a request to the workers."""
        request.deadline = time.monotonic() + self.timeout
        self.nodes.began(request.unique, data)
        self.pending[request.unique] = request
        self.queue.put(request)

    def wanted(self, request: Request) -> bool:
        """Whether a request still waits: it has neither been interrupted nor come to its deadline."""
        return not request.deadline or request.unique in self.pending

    def reply(self, request: Request, body: bytes = b"") -> bool:
        """Answer it, if it still waits; always True."""
        with self.lock:
            if self._end(request):
                self.device.answer(request.unique, body)
        return True

    def refuse(self, request: Request, errno: int) -> bool:
        """Answer with an error, if it still waits; always True."""
        with self.lock:
            if self._end(request):
                self.device.refuse(request.unique, errno)
        return True

    def _end(self, request: Request) -> bool:
        if not request.deadline:
            return True
        if self.pending.pop(request.unique, None) is None:
            return False
        self.nodes.ended(request.unique)
        return True

    def interrupt(self, request: Request) -> bool:
        """Answer the request that this one interrupts; itself has no answer."""
        pending = self.pending.get(int.from_bytes(request.body[:8], "little"))
        if pending is not None:
            self.refuse(pending, EINTR)
        return True

    def init(self, request: Request) -> bool:
        """The first request."""
        body, passthrough, resend = fuse.accept_init(request.body)
        self.nodes.start(passthrough, resend)
        return self.reply(request, body)

    def until_next(self) -> float | None:
        """Milliseconds until a request comes to its deadline; None: there is none."""
        with self.lock:
            first = next(iter(self.pending.values()), None)
        return None if first is None else max(1.0, (first.deadline - time.monotonic()) * 1000 + 1)

    def expire(self) -> None:
        """Answer what has come to its deadline with EIO."""
        with self.lock:
            for request in list(self.pending.values()):
                if request.deadline > time.monotonic():
                    return
                self.refuse(request, EIO)
