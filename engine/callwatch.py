"""The node's side of csrc/callwatch.c, which answers the system calls of strict jobs."""

from __future__ import annotations

import array
import enum
import os
import socket
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROGRAM: Final = Path(__file__).parent / "bin" / "callwatch"

# csrc/callwatch.h
_ORDER: Final = struct.Struct("=IIii")
QUESTION: Final = struct.Struct("=IIiiiiQ")
SLOTS: Final = 8192
"""Listeners at most."""
NOTES_SIZE: Final = 1024 * 16 + SLOTS * 512
_SPACE, _LISTEN, _ANSWER = 1, 2, 3


class Kind(enum.IntEnum):
    """What callwatch asks or tells (csrc/callwatch.h)."""

    SIGNAL = 1  # to `target`, as kill(2) has it
    BORN = 2  # `pid` has been forked by `target`: both stand still until the answer
    OVER = 3  # nobody is under the listener `token` any more


@dataclass(frozen=True, slots=True)
class Question:
    """One packet; pids are job pids, and `code` and `value` as in siginfo_t."""

    kind: Kind
    token: int
    pid: int
    target: int
    signo: int
    code: int
    value: int


class CallWatch:
    """One process, for all strict jobs of a node.

    Attributes:
        socket: non-blocking; a question a message; its end means that callwatch has died.
    """

    def __init__(self, init: int, notes: int) -> None:
        """Start it.

        Args:
            init: host pid of nodeinit.
            notes: a file of `NOTES_SIZE` bytes, zeros at first, the same for its successors.

        Raises:
            OSError: it cannot be started.
        """
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [str(PROGRAM), str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd="/", start_new_session=True,
                    env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            fds = [os.open(f"/proc/{init}/root/proc", os.O_PATH | os.O_CLOEXEC)]
            try:
                fds.append(os.open(f"/proc/{init}/ns/pid", os.O_RDONLY | os.O_CLOEXEC))
                self._send(_SPACE, fds=[*fds, notes])
            finally:
                for fd in fds:
                    os.close(fd)
            self.socket.setblocking(False)
        except BaseException:
            self.socket.close()
            raise

    @property
    def pid(self) -> int:
        """Its own."""
        return self._process.pid

    def listen(self, number: int, slot: int, listener: int) -> None:
        """Have it answer what comes from a listener; the caller keeps the descriptor.

        Args:
            number: tells it from all others that ever were.
            slot: tells it from all others that are, and is below `SLOTS`.
        """
        self._send(_LISTEN, number, slot, fds=[listener])

    def answer(self, token: int, error: int | None) -> None:
        """The call fails with this errno, succeeds (0), or is the kernel's business (None)."""
        self._send(_ANSWER, token, error or 0, error is None)

    def _send(self, kind: int, token: int = 0, error: int = 0, native: bool = False, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.socket.sendmsg([_ORDER.pack(kind, token, error, native)], rights)
        except OSError:
            pass  # it has died, which its reader notices; or has more to read than it will ever: it gives up in time

    def read(self) -> Question | None:
        """One question; None: nothing is there.

        Raises:
            EOFError: it has died.
        """
        try:
            packet = self.socket.recv(QUESTION.size)
        except BlockingIOError:
            return None
        except OSError:
            packet = b""
        if len(packet) != QUESTION.size:
            raise EOFError
        kind, *rest = QUESTION.unpack(packet)
        return Question(Kind(kind), *rest)

    def close(self) -> None:
        """End it."""
        self.socket.close()
        self._process.wait()
