"""Copies stdin to stdout, and can be told to take other descriptors for them, like a process that moved.

argv: number of a Unix stream socket. A byte on it freezes the copying between two system calls; an answer says so. Then
`socket.recv_fds` of new descriptors for 0 and 1 (none: the old ones), and it goes on. Half-written data stays, as in a
moved process's memory.
"""

import os
import select
import socket
import sys
from typing import Any

control = socket.socket(fileno=int(sys.argv[1]))
pending = b""
ended = False
while pending or not ended:
    wanted: list[Any] = [control] if pending else [control, 0]
    outputs: list[Any] = [1] if pending else []
    ready, writable, _ = select.select(wanted, outputs, [])
    if control in ready:
        if not control.recv(1):
            sys.exit(9)
        control.sendall(b"F")
        fds = socket.recv_fds(control, 1, 2)[1]
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        control.sendall(b"G")
    elif writable:
        pending = pending[os.write(1, pending[:4096]) :]  # PIPE_BUF: does not block
    elif 0 in ready:
        pending = os.read(0, 65536)
        ended = not pending
