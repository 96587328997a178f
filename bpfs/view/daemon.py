"""The view's daemon: answers the kernel's questions about the master's files.

One thread reads /dev/fuse and answers what can be answered from memory and the object store, interruptions above all;
what needs the network goes to `WORKERS` threads with a stream each, one more hears of changes, one serves bpslave.
Where the kernel can (6.9), an open file is passed through to its object: the kernel reads and maps that by itself, and
does so when this daemon is dead.

bpslave keeps the descriptor of /dev/fuse and starts the daemon again when it dies: the journal (bpfs.view.nodes) tells
the new one what the kernel knows, and the kernel sends again what was not answered.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
from errno import EINTR, EIO, ENODEV, ENOENT, ENOSYS, ESTALE
from pathlib import Path

from bpfs import kernel, log
from bpfs.view import fuse
from bpfs.view.changes import Changes
from bpfs.view.contents import Contents
from bpfs.view.control import Control
from bpfs.view.core import Core, Quick, Request, Slow
from bpfs.view.fuse import Device, Op
from bpfs.view.names import Names
from bpfs.view.peers import Giver
from bpfs.view.remote import Connector, Remote, Silent
from bpfs.view.store import Store

_log = log.get("view")

WORKERS = 4
_NODELESS = (Op.INTERRUPT, Op.INIT, Op.BATCH_FORGET, Op.FORGET, Op.DESTROY, Op.STATFS)


class Daemon:
    """The daemon itself."""

    def __init__(self, core: Core, connector: Connector, store: Store, giver: Giver) -> None:
        self._core = core
        self._connector = connector
        self._giver = giver
        self._changes = Changes(core)
        names, self._contents = Names(core, self._changes), Contents(core, self._changes, store)
        self._quick: dict[int, Quick] = {
            **names.quick,
            **self._contents.quick,
            Op.INIT: core.init,
            Op.INTERRUPT: core.interrupt,
            Op.STATFS: lambda request: core.reply(request, fuse.statfs_out(store.objects)),
            Op.DESTROY: core.reply,
        }
        self._slow: dict[int, Slow] = {**names.slow, **self._contents.slow}

    def run(self) -> None:
        """Serve until the file system is unmounted."""
        threading.Thread(target=self._changes.run, args=(self._remote(),), daemon=True).start()
        for _ in range(WORKERS):
            threading.Thread(target=self._work, daemon=True).start()
        self._take_over()
        device = self._core.device.fd
        poller = select.poll()
        poller.register(device, select.POLLIN)
        while True:
            try:
                data = os.read(device, fuse.BUFFER)
            except BlockingIOError:
                poller.poll(self._core.until_next())
                self._core.expire()
                continue
            except OSError as error:
                if error.errno == ENODEV:
                    return
                if error.errno in (EINTR, ENOENT):  # ENOENT: it was given up while it was read
                    continue
                raise
            self._serve(data)

    def _remote(self) -> Remote:
        return Remote(self._connector, self._core.timeout, self._giver)

    def _take_over(self) -> None:
        nodes = self._core.nodes
        for data in list(nodes.waiting.values()):
            self._serve(data)
        if nodes.resend:
            self._core.device.resend()

    def _serve(self, data: bytes) -> None:
        _, op, unique, node, *_ = fuse.REQUEST.unpack_from(data)
        request = Request(op, unique, node, data[fuse.REQUEST.size :])
        handler = self._quick.get(op)
        with self._core.lock:
            if handler is None:
                self._core.refuse(request, ENOSYS)
            elif node not in self._core.nodes.by_number and op not in _NODELESS:
                self._core.refuse(request, ESTALE)
            elif not handler(request):
                self._core.send_far(request, data)

    def _work(self) -> None:
        remote = self._remote()
        while True:
            request = self._core.queue.get()
            if not self._core.wanted(request):
                continue
            try:
                self._slow[request.op](request, remote)
            except OSError as error:
                self._core.refuse(request, EIO if isinstance(error, Silent) else error.errno or EIO)
            except Exception as error:
                _log.error("a request failed", exc_info=error)
                self._core.refuse(request, EIO)


def main(argv: list[str]) -> int:
    """`FUSE_FD STREAMS_FD CONTROL_FD CACHE LIMIT TIMEOUT`: started by bpslave only."""
    fuse_fd, streams_fd, control_fd, cache, limit, timeout = argv
    kernel.set_parent_death_signal(signal.SIGKILL)
    kernel.set_comm("bpview")
    log.start("view", None, False)
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # somebody opens an object that is about to be removed
    threading.stack_size(256 << 10)
    sys.setswitchinterval(0.0005)  # the reader answers at once, whatever the others do
    os.set_blocking(int(fuse_fd), False)
    directory = Path(cache)
    store = Store(directory / "objects", int(limit))
    connector = Connector(socket.socket(fileno=int(streams_fd)))
    core = Core(Device(int(fuse_fd)), directory / "journal", float(timeout))
    giver = Giver(store)
    control = Control(socket.socket(fileno=int(control_fd)), store, Remote(connector, core.timeout, giver))
    threading.Thread(target=control.run, daemon=True).start()
    Daemon(core, connector, store, giver).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
