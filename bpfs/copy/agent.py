# SPDX-License-Identifier: GPL-2.0-or-later
"""The program that bpcp runs on every node of a copy: one place in the tree.

Its standard input and output belong to bpcp, a JSON object a line. From bpcp: the orders, once all are there. To bpcp:
`port` (a receiver listens) or `ready`; `total` and `sent` (bytes); `error` (a sentence that names the file); `dropped`
and `why` (a child was given up); `alive` (a receiver at work); `lost` (the feed ended too early); `done` with the
number of failures, at the end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from typing import Any

from bpfs.copy.frames import Children, FeedLost, accept, frames
from bpfs.copy.receiver import Receiver
from bpfs.copy.sender import Sender

_ALIVE_S = 0.5  # between two signs of life: well below any --timeout


def report(**fields: Any) -> None:
    """One line to bpcp."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def main(role: str, address: str) -> int:
    """Runs one agent; `role` is `send` or `receive`, `address` the one to listen at."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    listener = None
    if role == "receive":
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            listener = socket.create_server((address, 0), family=family)
        except OSError as error:
            report(error=f"cannot listen at {address}: {error.strerror}")
            return 1
        report(port=listener.getsockname()[1])
    else:
        report(ready=True)
    line = sys.stdin.readline()
    if not line:
        return 1  # bpcp is gone
    orders = json.loads(line)
    children = Children(orders["stall"], report)
    if listener is None:
        _connect(children, orders)
        sender = Sender(children, report, recursive=orders["recursive"], rate=orders["rate"])
        sender.run(orders["sources"], orders["suffix"])
        report(done=int(sender.failed))
    else:
        _receive(listener, children, orders)
    children.close()
    return 0


def _connect(children: Children, orders: dict[str, Any]) -> None:
    for node, host, port, token in orders["children"]:
        children.connect(node, host, port, bytes.fromhex(token))


def _receive(listener: socket.socket, children: Children, orders: dict[str, Any]) -> None:
    told = time.monotonic()
    receiver = Receiver(orders["target"], report, folder=orders["folder"], preserve=orders["preserve"])
    try:
        # First our children: when we have our feed, they may wait for nothing but data.
        _connect(children, orders)
        feed = accept(listener, bytes.fromhex(orders["token"]), orders["stall"])
        for kind, offset, body in frames(feed, children, orders["stall"]):
            receiver.take(kind, offset, body)
            if time.monotonic() - told > _ALIVE_S:
                told = time.monotonic()
                report(alive=True)
    except FeedLost as error:
        report(lost=str(error))
    else:
        report(done=receiver.failures)
    finally:
        receiver.close()


if __name__ == "__main__":
    code = main(sys.argv[1], sys.argv[2])
    sys.stdout.flush()
    os._exit(code)  # nothing is left to be tidied up, and it is quicker
