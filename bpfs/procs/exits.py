"""How processes of the master end: exit events of the kernel's process connector.

Only the parent can wait for a process; the connector tells everybody (linux/cn_proc.h, linux/connector.h). It is
listened to only while somebody waits.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from bpfs.procs.process import ExitStatus

NETLINK_CONNECTOR = 11  # linux/netlink.h
CN_IDX_PROC = CN_VAL_PROC = 1  # linux/connector.h
PROC_CN_MCAST_LISTEN = 1  # linux/cn_proc.h
PROC_EVENT_EXIT = 0x80000000
INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # linux/proc_ns.h: PROC_PID_INIT_INO
RECEIVE_BUFFER = 8 << 20  # bytes: what 10,000 exits of a moment need

_NLMSG = struct.Struct("=IHHII")  # struct nlmsghdr
_CN_MSG = struct.Struct("=IIIIHH")  # struct cn_msg, without data
_EVENT = struct.Struct("=IIQ")  # struct proc_event: what, cpu, timestamp_ns
_EXIT = struct.Struct("=iiII")  # process_pid, process_tgid, exit_code, exit_signal


def _listen() -> socket.socket:
    if os.stat("/proc/self/ns/pid").st_ino != INITIAL_PID_NAMESPACE:
        # cn_proc_mcast_ctl() drops the order without a word.
        raise OSError(errno.EOPNOTSUPP, "outside of the initial pid namespace the kernel does not tell")
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, NETLINK_CONNECTOR)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    sock.bind((0, CN_IDX_PROC))
    order = struct.pack("=I", PROC_CN_MCAST_LISTEN)
    message = _CN_MSG.pack(CN_IDX_PROC, CN_VAL_PROC, 0, 0, len(order), 0) + order
    sock.send(_NLMSG.pack(_NLMSG.size + len(message), 3, 0, 0, os.getpid()) + message)  # 3: NLMSG_DONE
    return sock


def parse_exit(packet: bytes) -> tuple[int, ExitStatus] | None:
    """Pid and status of a process that ended; None for all other events, and for threads."""
    at = _NLMSG.size + _CN_MSG.size
    if len(packet) < at + _EVENT.size + _EXIT.size or _EVENT.unpack_from(packet, at)[0] != PROC_EVENT_EXIT:
        return None
    pid, tgid, code, _ = _EXIT.unpack_from(packet, at + _EVENT.size)
    if pid != tgid:
        return None
    signo = code & 0x7F
    if signo:
        return pid, ExitStatus(signal=signo, core=bool(code & 0x80))
    return pid, ExitStatus(code=code >> 8 & 0xFF)


@contextmanager
def listening() -> Iterator[Callable[[int], Awaitable[ExitStatus]]]:
    """Hears all ends from now on; the function it gives waits for that of one process.

    Raises:
        OSError: the kernel has no connector, or this is not the initial pid and network namespace.
    """
    sock = _listen()

    async def exit_of(pid: int) -> ExitStatus:
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                found = parse_exit(sock.recv(4096))
            except BlockingIOError:
                continue
            if found is not None and found[0] == pid:
                return found[1]

    try:
        yield exit_of
    finally:
        sock.close()
